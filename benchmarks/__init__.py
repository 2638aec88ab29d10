"""
The benchmarks of the paper, one module each: `read` opens what its authors released, `score` scores a model on it.

    blimp         FOLDER/*.jsonl with sentence_good, sentence_bad, field, linguistics_term, UID (Warstadt et al., 2020)
    mmlu          .csv or .csv.xz with columns subject, question, A, B, C, D, answer (Hendrycks et al., 2021)
    sblimp        FOLDER/syntactic/{dev,test}/NAME.wav, and gold.csv with columns id, filename, voice, type, subtype,
                  correct, transcription (ZeroSpeech 2021, task sLM21)
    storycloze    {2k}_STORY_correct.wav and {2k+1}_STORY_incorrect.wav (TWIST's layout: whole stories), or
                  X_{mutual,correct,incorrect}.{wav,txt} (slamkit's cross-modal layout: context and endings apart), or a
                  paired data set (see data.py) whose documents come in threes: opening, true ending, wrong ending
    librispeech   data sets with speech or text; the negative log-likelihood of their documents

`hear` turns sound files into speech units and keeps them. `utterances` has the words of utterances, for analyze.py.
`report` has the statistics and the tables.

A reader returns plain lists and dicts. It raises a ValueError that names the file, the line and the fault.
`score(evaluator, place, protocol)` takes an evaluate.Evaluator, the path of the data and the protocol of the task. It
returns (result, items): what goes into evaluation.json, and arrays with one value per item.

Protocols of the tasks of evaluate.py:

    blimp        BLiMP, 67 paradigms of 1000 pairs of sentences. The one with the higher log-likelihood is chosen.
    sblimp       ZeroSpeech 2021 sLM21: the same with spoken sentences, by the mean log-likelihood of their units. A
                 pair is averaged over its voices. `accuracy` is the mean over pairs, as on the leaderboard;
                 `by_type_mean` is the unweighted mean over types, as in the authors' release. Submission files
                 evaluation.sblimp.SPLIT.txt are written, with lines `filename score`.
    tstorycloze  Topic-StoryCloze and StoryCloze in the settings T, S, T->S, S->T: the context and then the ending, each
    sstorycloze  written (T) or spoken (S). The ending with the higher mean log-likelihood after the context is chosen.
                 There are three layouts: TWIST's wavs of whole stories (setting S only, the whole utterance is
                 scored), slamkit's cross-modal form (context and endings in files of their own, which are encoded
                 apart), or a paired data set as for topic_cloze.
    topic_cloze  The demo's: a paired data set with documents in threes, opening, true ending, another story's ending.
    mmlu         Zero-shot in SmolLM's cloze form: " CHOICE" continues the prompt "The following are questions about
                 SUBJECT.\\nQuestion: Q\\nAnswer:". acc: the choice with the highest summed log-likelihood. acc_norm:
                 the one with the highest sum per character of the choice. Both are means over subjects. With
                 --before=FOLDER that model is scored too, which gives the table's "pre".
    librispeech  NLL per unit (text: per token, and perplexity) of the documents of data sets, each by itself. A
    text         document that is longer than the context is read in windows that overlap by half.
    nll          NLL of random windows of held-out data sets, drawn as in training.

--protocol.TASK.KEY=VALUE changes a protocol, and every result says which one it was made with:

    score   "sum" or "mean" over the scored tokens: what is compared. The other one is reported beside it.
    span    what is scored: "continuation" alone, or "whole", the context too (as slamkit does)
    ties    among k best candidates: "share" (1/k if the right one is among them), "wrong" (0) or "first" (the first
            candidate wins)
    bos     whether the EOS of its modality stands before a sequence, as in training. Without it the first token is not
            scored.
    prefix  number of random text tokens before the context in S->T: 0, or 10 as in the authors' release (the paper does
            not mention them)

The EOS that ends a document is never scored. One switch token stands where the modality changes; it is never scored
either.
"""
