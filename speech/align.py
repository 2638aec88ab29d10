"""
Word times from the waveform: forced alignment with MMS's wav2vec 2.0, or with pocketsphinx.
"""
import math
import os
import re
from typing import NamedTuple

import numpy as np

from runtime.files import one_line, read_json
from speech.audio import SAMPLE_RATE
from speech.transcripts import fill_spans, match_words, spoken_form, unspeakable
from speech.wav2vec import check_size, frame_geometry

# Word times from the waveform: CTC forced alignment, after MMS (Pratap et al., 2023)
#
# A wav2vec 2.0 gives log-probabilities of letters every 20 ms. The Viterbi path through blank, letter, blank, ... says
# when each letter is spoken.

MMS_LABELS = "- a i e n o u t s r m k l d g h y b p w c v j z f ' q x".split()  # column 0 is CTC's blank
WINDOW_SECONDS, CONTEXT_SECONDS = 30, 3  # long audio goes through the model in windows that see this much on each side
BATCH_SECONDS = 120  # of audio in the model at once
BATCH_POINTERS, MAX_POINTERS = 1 << 28, 1 << 31  # bytes of Viterbi back-pointers: of a batch, of a single recording


class Aligner(NamedTuple):
    model: object  # (input_values [B, n], attention_mask [B, n]) -> .logits [B, frames, columns]
    labels: dict  # lower-case letter -> column
    blank: int  # column of CTC's blank
    hop: int  # samples from one frame to the next: 320
    field: int  # samples that a frame sees: 400
    device: str


def load_aligner(folder, device="cpu"):
    """
    An Aligner out of a folder with a Wav2Vec2ForCTC (config.json, model.safetensors) and, unless its columns are
    MMS_LABELS, vocab.json {letter: column}; or, for the name "pocketsphinx", that package's recogniser. Raises
    ValueError if the folder is incomplete, or if the model has no layer-norm extractor (the other kind, "group", would
    let padding change the result).
    """
    if folder == "pocketsphinx":
        return load_sphinx()
    try:
        from transformers import Wav2Vec2ForCTC
    except ImportError:
        raise RuntimeError("transformers is missing: pip install 'smoltolk[speech]'") from None
    try:
        check_size(Wav2Vec2ForCTC, folder)
        model, report = Wav2Vec2ForCTC.from_pretrained(folder, local_files_only=True, use_safetensors=True,
                                                       ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as error:  # of many kinds, by what is damaged and by the version of transformers
        raise ValueError(f"{folder}: no Wav2Vec2ForCTC with model.safetensors ({one_line(error)})") from None
    lacking = {str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind]}
    lacking -= {"wav2vec2.masked_spec_embed"}  # for training only
    if lacking:
        raise ValueError(f"{folder}: model.safetensors does not have all of the model: {sorted(lacking)[0]}")
    config = model.config
    if config.feat_extract_norm != "layer":
        raise ValueError(f"{folder}: feat_extract_norm is {config.feat_extract_norm!r}; only 'layer' bears padding")
    labels, blank = {label: i for i, label in enumerate(MMS_LABELS)}, 0
    vocabulary = os.path.join(folder, "vocab.json")
    if os.path.exists(vocabulary):
        labels = {label.lower(): i for label, i in read_json(vocabulary).items()}
        blank = labels.get("<blank>", config.pad_token_id)
        if not all(type(i) is int and i >= 0 for i in [*labels.values(), blank]):
            raise ValueError(f"{vocabulary}: is no {{letter: column}} with a column for the blank")
    elif config.vocab_size != len(labels):
        raise ValueError(f"{folder}: {config.vocab_size} columns without a vocab.json; MMS has {len(labels)}")
    labels = {label: i for label, i in labels.items() if re.fullmatch("[a-z']", label) and i != blank}
    if not labels or max(*labels.values(), blank) >= config.vocab_size:
        raise ValueError(f"{folder}: vocab.json does not fit the model's {config.vocab_size} columns")
    return Aligner(model.float().eval().to(device), labels, blank, *frame_geometry(config), str(device))


def emissions(waveforms, aligner):
    """
    Log-probabilities, a float32 tensor [n_frames, columns] for each 16 kHz waveform [n], n >= aligner.field, with
    n_frames = (n - field) // hop + 1. The waveform is normalised as a whole; a batch has pieces alike in length.
    """
    import torch

    window, context = (seconds * SAMPLE_RATE // aligner.hop for seconds in (WINDOW_SECONDS, CONTEXT_SECONDS))
    pieces = []  # (samples, waveform, first frame to keep, how many); all in order
    for i, waveform in enumerate(waveforms):
        samples = torch.as_tensor(np.ascontiguousarray(waveform, np.float32))
        samples = torch.nn.functional.layer_norm(samples, samples.shape)
        n_frames = (len(samples) - aligner.field) // aligner.hop + 1
        for first in range(0, n_frames, window):
            kept = min(window, n_frames - first)
            left, right = max(0, first - context), min(n_frames, first + kept + context)
            cut = samples[left * aligner.hop:(right - 1) * aligner.hop + aligner.field]
            pieces.append((cut, i, first - left, kept))
    order = sorted(range(len(pieces)), key=lambda p: len(pieces[p][0]))
    found = [None] * len(pieces)
    while order:
        size = max(1, BATCH_SECONDS * SAMPLE_RATE // len(pieces[order[-1]][0]))
        batch, order = order[-size:], order[:-size]
        inputs = torch.nn.utils.rnn.pad_sequence([pieces[p][0] for p in batch], batch_first=True)
        lengths = torch.tensor([len(pieces[p][0]) for p in batch])
        mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
        with torch.inference_mode():
            logits = aligner.model(inputs.to(aligner.device), attention_mask=mask.to(aligner.device)).logits
            for p, rows in zip(batch, logits.float().log_softmax(-1)):
                found[p] = rows[pieces[p][2]:pieces[p][2] + pieces[p][3]].clone()
    parts = [[] for _ in waveforms]
    for rows, (_, i, _, _) in zip(found, pieces):
        parts[i].append(rows)
    return [torch.cat(rows) for rows in parts]


def ctc_paths(log_probs, targets, blank):
    """
    The likeliest path of CTC through each target: [(states int64 [n_frames], log-probability), ...]. State 2k + 1 is
    token k of the target, even states are the blanks around them; 2L + 1 states for L tokens.

    log_probs: float tensors [n_frames, columns]; targets: lists of L > 0 columns with L + repeats <= n_frames. All are
    one batch; the back-pointers of each utterance take the longest n_frames times the longest 2L + 1 bytes.
    """
    import torch

    device, n = log_probs[0].device, len(targets)
    lengths = torch.tensor([len(rows) for rows in log_probs], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(list(log_probs))  # [T, n, columns]
    columns = torch.full((n, 2 * max(map(len, targets)) + 1), blank)
    for i, target in enumerate(targets):
        columns[i, 1:2 * len(target):2] = torch.tensor(target)
    # from a token straight to the next, without a blank between, unless they are the same
    jumps = torch.zeros(columns.shape, dtype=torch.bool)
    jumps[:, 3::2] = columns[:, 3::2] != columns[:, 1:-2:2]
    columns, jumps = columns.to(device), jumps.to(device)

    exact = torch.float32 if device.type == "mps" else torch.float64
    pointers = torch.zeros((len(padded), *columns.shape), dtype=torch.int8, device=device)  # states gone ahead: 0, 1, 2
    score = padded[0].to(exact).gather(1, columns)
    score[:, 2:] = -math.inf
    for t in range(1, len(padded)):
        step = torch.nn.functional.pad(score, (1, 0), value=-math.inf)[:, :-1]
        jump = torch.nn.functional.pad(score, (2, 0), value=-math.inf)[:, :-2].masked_fill(~jumps, -math.inf)
        best, pointer = torch.stack([score, step, jump]).max(0)
        score = torch.where(t < lengths[:, None], best + padded[t].to(exact).gather(1, columns), score)
        pointers[t] = pointer

    last = torch.tensor([[2 * len(target) - 1, 2 * len(target)] for target in targets], device=device)
    total, which = score.gather(1, last).max(1)  # it ends with the last token or the blank after it
    state = last.gather(1, which[:, None])  # [n, 1]
    path = torch.empty((len(padded), n), dtype=torch.int64, device=device)
    for t in range(len(padded) - 1, -1, -1):
        path[t] = state[:, 0]
        state = torch.where(t < lengths[:, None], state - pointers[t].gather(1, state), state)
    path, total = path.cpu().numpy(), total.tolist()
    return [(path[:len(rows), i], total[i]) for i, rows in enumerate(log_probs)]


def alignment_target(text, aligner):
    """(columns of a text's letters, (first, last + 1) letter or None for each word); ValueError if it has others."""
    target, letters = [], []
    for word in text.split():
        spelling = "".join(spoken_form(word))
        if "'" not in aligner.labels:
            spelling = spelling.replace("'", "")
        if unspeakable(word) or any(letter not in aligner.labels for letter in spelling):
            raise ValueError(f"word cannot be aligned: {word!r} in {text[:60]!r}")
        letters.append((len(target), len(target) + len(spelling)) if spelling else None)
        target += [aligner.labels[letter] for letter in spelling]
    if not target:
        raise ValueError(f"empty transcript: nothing is spoken in {text[:60]!r}")
    return target, letters


def align(waveforms, texts, aligner, star=True):
    """
    Word times by forced alignment: for each utterance [(start, end), ...] in seconds for text.split(), or a ValueError
    (returned, not raised, so that the others go on) that says why there are none.

    waveforms: float arrays [n] at 16 kHz; texts: a transcript each; star: MMS's star token, which is as likely as
    certain everywhere, before and after the transcript, where it takes in speech that was not transcribed. (It also
    leaves the first and the last letter no more than their likeliest frame. The ends of all words but the last are
    untouched by it, and word_units asks for no others.)
    A word lasts from the first frame of its first letter to the end of the last frame of its last; frames are spread
    evenly over the audio. Words that are not spoken, and the order of ends, are as in match_words. Viterbi takes
    n_frames * (2L + 1) bytes for L letters, 2 GiB at most: about 20 minutes of speech.
    """
    import torch

    if not isinstance(aligner, Aligner):
        return [align_sphinx(waveform, text, aligner) for waveform, text in zip(waveforms, texts, strict=True)]
    results, waiting = [None] * len(texts), []  # waiting: (utterance, target, letters of each word, n_frames)
    for i, (waveform, text) in enumerate(zip(waveforms, texts, strict=True)):
        try:
            target, letters = alignment_target(text, aligner)
            shift = int(star)
            tokens = [-1] * shift + target + [-1] * shift  # the star will be the last column
            needed = len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:]))
            n_frames = max(0, (len(waveform) - aligner.field) // aligner.hop + 1)
            if n_frames < needed:
                raise ValueError(f"audio too short for its transcript: {n_frames} frames of {needed} for {text[:60]!r}")
            if n_frames * (2 * len(tokens) + 1) > MAX_POINTERS:
                raise ValueError(f"audio too long to align: {len(waveform) / SAMPLE_RATE:.0f} s, {text[:60]!r}")
            if not np.isfinite(waveform).all():
                raise ValueError(f"audio is not finite: {text[:60]!r}")
            waiting.append((i, tokens, [span and (span[0] + shift, span[1] + shift) for span in letters], n_frames))
        except ValueError as error:
            results[i] = error
    rows = dict(zip([w[0] for w in waiting], emissions([waveforms[w[0]] for w in waiting], aligner)))
    waiting.sort(key=lambda w: -w[3])
    while waiting:
        most = longest = 0
        for size, (_, tokens, _, _) in enumerate(waiting, 1):
            longest = max(longest, 2 * len(tokens) + 1)
            if size * waiting[0][3] * longest > BATCH_POINTERS:
                break
            most = size
        batch, waiting = waiting[:max(1, most)], waiting[max(1, most):]
        with_star = [torch.nn.functional.pad(rows.pop(i), (0, 1)) for i, *_ in batch]
        n_columns = with_star[0].shape[1]
        targets = [[column % n_columns for column in tokens] for _, tokens, _, _ in batch]
        for (i, _, letters, n_frames), (path, total) in zip(batch, ctc_paths(with_star, targets, aligner.blank)):
            if not math.isfinite(total):
                results[i] = ValueError(f"alignment failed: the model is not finite on {texts[i][:60]!r}")
                continue
            seconds = len(waveforms[i]) / n_frames / SAMPLE_RATE
            # states ascend along the path, so the frames of letter k are found by bisection
            spans = [span and (np.searchsorted(path, 2 * span[0] + 1) * seconds,
                               np.searchsorted(path, 2 * span[1] - 1, side="right") * seconds) for span in letters]
            results[i] = [(float(start), float(end)) for start, end in fill_spans(spans)]
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Word times from pocketsphinx: an English recogniser of old that pip brings whole (30 MB, no GPU, 60 times real time).
# Its words are those of its dictionary, and it wants the transcript to be all that is said.

SPHINX_STEP = 0.01  # seconds


def load_sphinx():
    """Two recognisers that only align: one with the usual beam, and one that gives up much later, and is slower."""
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise RuntimeError("pocketsphinx is missing: pip install 'smoltolk[speech]'") from None
    wide = dict(beam=1e-120, wbeam=1e-100, pbeam=1e-120)
    return [Decoder(lm=None, loglevel="FATAL", **beams) for beams in ({}, wide)]


def align_sphinx(waveform, text, decoders):
    """align() of one utterance with pocketsphinx: [(start, end), ...], or a ValueError that says why there are none."""
    try:
        for word in text.split():
            unknown = [form for form in spoken_form(word) if decoders[0].lookup_word(form) is None]
            if unspeakable(word) or unknown:
                raise ValueError(f"word cannot be aligned: {word!r} is not in pocketsphinx's dictionary")
        spoken = [form for word in text.split() for form in spoken_form(word)]
        if not spoken:
            raise ValueError(f"empty transcript: nothing is spoken in {text[:60]!r}")
        samples = (np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes()
        for decoder in decoders:
            decoder.set_align_text(" ".join(spoken))
            decoder.start_utt()
            decoder.process_raw(samples, full_utt=True)
            decoder.end_utt()
            # "the(2)" is another pronunciation; <s>, </s>, <sil>, [NOISE] and (NULL) are no words
            said = [(part.word.split("(")[0], part.start_frame * SPHINX_STEP, (part.end_frame + 1) * SPHINX_STEP)
                    for part in decoder.seg() or ()]
            said = [part for part in said if part[0] and part[0][0] not in "<["]
            if [part[0] for part in said] == spoken:
                return match_words(text.split(), said, len(waveform) / SAMPLE_RATE)
        raise ValueError(f"alignment failed: pocketsphinx does not hear all of {text[:60]!r}")
    except ValueError as error:
        return error
