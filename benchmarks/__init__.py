"""
The benchmarks of the paper, one module each. `read` reads the released files, and `score` scores a model on them.

    blimp         FOLDER/*.jsonl with sentence_good, sentence_bad, field, linguistics_term, UID (Warstadt et al., 2020)
    mmlu          .csv or .csv.xz with columns subject, question, A, B, C, D, answer (Hendrycks et al., 2021)
    sblimp        FOLDER/syntactic/{dev,test}/NAME.wav, and gold.csv with columns id, filename, voice, type, subtype,
                  correct, transcription (ZeroSpeech 2021, task sLM21)
    storycloze    {2k}_STORY_correct.wav and {2k+1}_STORY_incorrect.wav (TWIST's layout: whole stories), or
                  X_{mutual,correct,incorrect}.{wav,txt} (slamkit's cross-modal layout: context and endings in separate
                  files), or a paired data set (see data.py) whose documents come in threes: opening, true ending,
                  wrong ending
    librispeech   data sets with speech or text (runtime/datasets.py)

`hear` turns sound files into speech units and stores them. `utterances` cuts utterances into words, for analyze.py.
`report` has the statistics and the tables.

`read` returns plain lists and dicts. It raises a ValueError that names the file, the line and the fault.
`score(evaluator, data, protocol)` takes an evaluate.Evaluator, the path of the data and the protocol of the task. It
returns (result, items): the task's entry in evaluation.json, and arrays with one value per item.

The tasks of evaluate.py and their protocols:

    blimp        BLiMP, 67 paradigms of 1000 pairs of sentences. The sentence with the higher log-likelihood is chosen.
    sblimp       ZeroSpeech 2021 sLM21: the same with spoken sentences, by the mean log-likelihood of their units. The
                 result of a pair is averaged over its voices. `accuracy` is the mean over pairs, as on the leaderboard.
                 `by_type_mean` is the unweighted mean over types, as in the authors' release. Submission files
                 evaluation.sblimp.SPLIT.txt are written, with lines `filename score`.
    tstorycloze  Topic-StoryCloze and StoryCloze in the settings T, S, T->S, S->T: the context and then the ending, each
    sstorycloze  written (T) or spoken (S). The ending with the higher mean log-likelihood after the context is chosen.
                 TWIST's wavs of whole stories allow setting S only, and the whole story is scored.
    topic_cloze  The same on the demo's stories. The wrong ending comes from another story.
    mmlu         Zero-shot in SmolLM's cloze form: " CHOICE" continues the prompt "The following are questions about
                 SUBJECT.\\nQuestion: Q\\nAnswer:". acc: the choice with the highest summed log-likelihood. acc_norm:
                 the one with the highest sum per character of the choice. Both are means over subjects. With
                 --before=FOLDER the model in that folder is scored too, as "pre" in Table 7.
    librispeech  NLL per unit (text: per token) and perplexity of the documents of data sets, each scored separately. A
    text         document that is longer than the context is read in windows that overlap by half.
    nll          NLL of random windows of held-out data sets, drawn as in training.

--protocol.TASK.KEY=VALUE changes a protocol. Every result is written with its protocol:

    score   candidates are compared by the "sum" or the "mean" of the log-likelihoods of their scored tokens. The result
            by the other measure is reported too.
    span    "continuation": score only the ending; "whole": score the context too, as slamkit does
    ties    if k > 1 candidates have the highest score: "share" (1/k if the right one is among them), "wrong" (0) or
            "first" (the first of them is chosen)
    bos     whether a sequence begins with the EOS of its modality, as in training. Without it the first token is not
            scored. The authors' release has it in sblimp, and not in the stories: there bos=true is our departure.
    prefix  default 0. With prefix=10 a context in S->T is preceded by the last ten text tokens of another story, its
            EOS included, drawn anew for each ending, without an EOS before them or a switch token after them. The
            authors' release does so, and the paper does not mention it.

A switch token stands at each change of modality. Neither switch tokens nor the EOS at the end of a document are scored.
"""
