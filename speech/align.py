"""
Forced alignment: word times from a waveform and its transcript, by MMS's wav2vec 2.0 or by pocketsphinx.

The wav2vec 2.0 of MMS (Pratap et al., 2023) was trained with connectionist temporal classification (CTC). Every 20 ms
it gives log-probabilities of all letters and of "blank", which stands for no letter. The Viterbi algorithm finds the
most likely path through blank, letter, blank, letter, ... of the transcript. This path tells when each letter is
spoken.
"""
import math
import os
import re
from typing import NamedTuple

import numpy as np

from runtime.files import read_json
from runtime.hub import local_folder
from speech.audio import SAMPLE_RATE
from speech.transcripts import fill_spans, match_words, spoken_form, unspeakable
from speech.wav2vec import frame_geometry, load_wav2vec

MMS_LABELS = "- a i e n o u t s r m k l d g h y b p w c v j z f ' q x".split()  # column 0 is CTC's blank
STAR = -1  # index of the last column, which align() adds: a token with probability 1 in every frame
WINDOW_SECONDS, CONTEXT_SECONDS = 30, 3  # long audio goes through the model in windows, with context on either side
BATCH_SECONDS = 120  # audio in one batch of the model
BATCH_POINTERS, MAX_POINTERS = 1 << 28, 1 << 31  # most bytes of Viterbi back-pointers: in a batch, in one utterance


class Aligner(NamedTuple):
    model: object  # (input_values [B, n], attention_mask [B, n]) -> .logits [B, frames, columns]
    labels: dict  # lower-case letter -> column
    blank: int  # column of CTC's blank
    hop: int  # samples from one frame to the next: 320
    field: int  # samples that one frame sees: 400
    device: str


class Utterance(NamedTuple):
    number: int  # index in the lists that align() was given
    tokens: list  # columns of the letters of the transcript, in order
    letters: list  # for each written word the range (first, last + 1) of its tokens, or None if it is not spoken
    n_frames: int


def load_aligner(folder, device="cpu"):
    """
    Load the Aligner in a folder, or the decoders of pocketsphinx if `folder` is "pocketsphinx".

    The folder holds a Wav2Vec2ForCTC. It also needs a vocab.json {letter: column}, unless the columns are MMS_LABELS.
    Raises ValueError for a damaged folder, RuntimeError if an optional package is missing.
    """
    if folder == "pocketsphinx":
        return load_sphinx()
    folder = local_folder(folder)
    try:
        from transformers import Wav2Vec2ForCTC
    except ImportError:
        raise RuntimeError("transformers is missing: pip install -e '.[speech]'") from None
    model = load_wav2vec(Wav2Vec2ForCTC, folder)
    if model.config.feat_extract_norm != "layer":  # with a group norm, padding would change the result
        raise ValueError(f"{folder}: feat_extract_norm is {model.config.feat_extract_norm!r}; only 'layer' can be used")
    labels, blank = read_labels(folder, model.config)
    return Aligner(model.to(device), labels, blank, *frame_geometry(model.config), str(device))


def read_labels(folder, config):
    """({letter: column}, column of the blank) of a folder's model. Raises ValueError if they do not fit the model."""
    path = os.path.join(folder, "vocab.json")
    if os.path.exists(path):
        columns = {label.lower(): column for label, column in read_json(path).items()}
        blank = columns.get("<blank>", config.pad_token_id)
    elif config.vocab_size == len(MMS_LABELS):
        columns, blank = {label: column for column, label in enumerate(MMS_LABELS)}, 0
    else:
        raise ValueError(f"{folder}: {config.vocab_size} columns without a vocab.json; MMS has {len(MMS_LABELS)}")
    letters = {label: column for label, column in columns.items() if re.fullmatch("[a-z']", label) and column != blank}
    fits = all(type(column) is int and 0 <= column < config.vocab_size for column in [*letters.values(), blank])
    if not letters or not fits:
        raise ValueError(f"{path}: vocab.json does not fit the model's {config.vocab_size} columns")
    return letters, blank


def align(waveforms, texts, aligner, star=True):
    """
    Find word times by forced alignment. Returns for each utterance [(start, end), ...] in seconds, one for each word of
    text.split(). For an utterance that cannot be aligned it returns a ValueError with the reason instead. It does not
    raise this error, so the other utterances are still aligned.

    waveforms: float arrays [n] at 16 kHz; texts: the transcript of each; star: put MMS's star token before and after
    the transcript. The star has probability 1 in every frame, so it absorbs speech that was not transcribed. It also
    absorbs every frame of the first and of the last letter except the most likely one. This changes the start of the
    first word and the end of the last word. word_units() uses neither.

    A word lasts from the first frame of its first letter to the end of the last frame of its last letter. Frames are
    spread evenly over the audio. Words that are not spoken, like "--", get empty spans from fill_spans().
    """
    import torch

    if not isinstance(aligner, Aligner):
        return [align_sphinx(waveform, text, aligner) for waveform, text in zip(waveforms, texts, strict=True)]
    results, utterances = [None] * len(texts), []
    for number, (waveform, text) in enumerate(zip(waveforms, texts, strict=True)):
        try:
            utterances.append(prepare(number, len(waveform), text, aligner, star))
        except ValueError as error:
            results[number] = error
    rows = emissions([waveforms[utterance.number] for utterance in utterances], aligner)
    log_probs = {utterance.number: each for utterance, each in zip(utterances, rows)}
    utterances.sort(key=lambda utterance: utterance.n_frames)
    most_states = max((2 * len(utterance.tokens) + 1 for utterance in utterances), default=1)
    while utterances:
        size = max(1, BATCH_POINTERS // (utterances[-1].n_frames * most_states))
        batch, utterances = utterances[-size:], utterances[:-size]
        # The star is one more column, with log-probability 0: [n_frames, columns + 1]
        rows = [torch.nn.functional.pad(log_probs[utterance.number], (0, 1)) for utterance in batch]
        paths = ctc_paths(rows, [utterance.tokens for utterance in batch], aligner.blank)
        for (number, _, letters, n_frames), (path, total) in zip(batch, paths):
            spans = word_spans(path, letters, len(waveforms[number]) / n_frames / SAMPLE_RATE)
            try:
                results[number] = fill_spans(texts[number].split(), spans)
            except ValueError as error:
                results[number] = error
            if not math.isfinite(total):
                results[number] = ValueError(f"alignment failed: the model is not finite on {texts[number][:60]!r}")
    return results


def prepare(number, n_samples, text, aligner, star):
    """The Utterance for a transcript and its n_samples of audio. Raises ValueError if they cannot be aligned."""
    tokens, letters = [STAR] * star, []
    for word in text.split():
        spelling = "".join(spoken_form(word))
        if "'" not in aligner.labels:
            spelling = spelling.replace("'", "")
        if unspeakable(word) or any(letter not in aligner.labels for letter in spelling):
            raise ValueError(f"word cannot be aligned: {word!r} in {text[:60]!r}")
        first = len(tokens)
        tokens += [aligner.labels[letter] for letter in spelling]
        letters.append((first, len(tokens)) if spelling else None)
    if not any(letters):
        raise ValueError(f"empty transcript: nothing is spoken in {text[:60]!r}")
    tokens += [STAR] * star
    needed = len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:]))  # equal neighbours need a blank between them
    n_frames = max(0, (n_samples - aligner.field) // aligner.hop + 1)
    if n_frames < needed:
        raise ValueError(f"audio too short for its transcript: {n_frames} frames of {needed} for {text[:60]!r}")
    if n_frames * (2 * len(tokens) + 1) > MAX_POINTERS:
        raise ValueError(f"audio too long to align: {n_samples / SAMPLE_RATE:.0f} s, {text[:60]!r}")
    return Utterance(number, tokens, letters, n_frames)


def word_spans(path, letters, frame_seconds):
    """(start, end) in seconds or None for each word, from a path of ctc_paths() and the token ranges of the words."""
    spans = []
    for tokens in letters:
        if tokens:
            # Token k is state 2k + 1. The states ascend along the path, so a binary search finds the frames of a token.
            start = np.searchsorted(path, 2 * tokens[0] + 1)
            end = np.searchsorted(path, 2 * tokens[1] - 1, side="right")
            spans.append((float(start * frame_seconds), float(end * frame_seconds)))
        else:
            spans.append(None)
    return spans


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of letters

def emissions(waveforms, aligner):
    """
    Log-probabilities of the letters: a float32 tensor [n_frames, columns] for each waveform.

    waveforms: [n] at 16 kHz, with n >= field. n_frames is (n - field) // hop + 1. Each waveform is normalised as a
    whole.
    """
    import torch

    pieces = []  # (number of the waveform, samples, first frame to keep, how many to keep)
    for number, waveform in enumerate(waveforms):
        samples = torch.as_tensor(np.ascontiguousarray(waveform, np.float32))
        samples = torch.nn.functional.layer_norm(samples, samples.shape)
        pieces += [(number, *window) for window in windows(samples, aligner)]
    found = [None] * len(pieces)
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i][1]))  # similar lengths need little padding
    while order:
        size = max(1, BATCH_SECONDS * SAMPLE_RATE // len(pieces[order[-1]][1]))
        batch, order = order[-size:], order[:-size]
        inputs = torch.nn.utils.rnn.pad_sequence([pieces[i][1] for i in batch], batch_first=True)  # [B, n]
        lengths = torch.tensor([len(pieces[i][1]) for i in batch])
        mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()  # [B, n]
        with torch.inference_mode():
            logits = aligner.model(inputs.to(aligner.device), attention_mask=mask.to(aligner.device)).logits
            log_probs = logits.float().log_softmax(-1)  # [B, frames, columns]
        for i, rows in zip(batch, log_probs):
            _, _, first, n_kept = pieces[i]
            found[i] = rows[first:first + n_kept].clone()

    parts = [[] for _ in waveforms]
    for (number, *_), rows in zip(pieces, found):
        parts[number].append(rows)
    return [torch.cat(rows) for rows in parts]


def windows(samples, aligner):
    """
    Cut samples into pieces, so that a long recording fits in memory.

    Returns [(samples of the piece, first of its frames to keep, number of frames to keep), ...]. The frames to keep
    last WINDOW_SECONDS. The piece extends CONTEXT_SECONDS beyond them on either side.
    """
    window, context = (seconds * SAMPLE_RATE // aligner.hop for seconds in (WINDOW_SECONDS, CONTEXT_SECONDS))
    n_frames = (len(samples) - aligner.field) // aligner.hop + 1
    pieces = []
    for first in range(0, n_frames, window):
        n_kept = min(window, n_frames - first)
        left, right = max(0, first - context), min(n_frames, first + n_kept + context)
        piece = samples[left * aligner.hop:(right - 1) * aligner.hop + aligner.field]
        pieces.append((piece, first - left, n_kept))
    return pieces


# ---------------------------------------------------------------------------------------------------------------------
# The most likely path

def ctc_paths(log_probs, targets, blank):
    """
    The most likely CTC path through each target: [(states int64 [n_frames], log-probability), ...]. A target of L
    tokens has 2L + 1 states: state 2k + 1 is token k, and the even states are the blanks around the tokens.

    log_probs: a batch of B float tensors [n_frames, columns]; targets: B lists of L > 0 columns. L plus the number of
    equal neighbours must be at most n_frames. A negative column counts from the end.
    """
    import torch

    device = log_probs[0].device
    padded = torch.nn.utils.rnn.pad_sequence(log_probs)  # [T, B, columns]
    lengths = torch.tensor([[len(rows)] for rows in log_probs], device=device)  # [B, 1]
    columns = torch.full((len(targets), 2 * max(map(len, targets)) + 1), blank)  # [B, S], the column of each state
    for i, target in enumerate(targets):
        columns[i, 1:2 * len(target):2] = torch.tensor(target) % padded.shape[2]
    score, pointers = viterbi(padded, lengths, columns.to(device))

    # A path ends with the last token or with the blank after it.
    last = torch.tensor([[2 * len(target) - 1, 2 * len(target)] for target in targets], device=device)  # [B, 2]
    total, which = score.gather(1, last).max(1)
    state = last.gather(1, which[:, None])  # [B, 1]
    path = torch.empty(padded.shape[:2], dtype=torch.int64, device=device)  # [T, B]
    for t in reversed(range(len(path))):
        path[t] = state[:, 0]
        state = torch.where(t < lengths, state - pointers[t].gather(1, state), state)
    path, total = path.cpu().numpy(), total.tolist()
    return [(path[:len(rows), i], total[i]) for i, rows in enumerate(log_probs)]


def viterbi(log_probs, lengths, columns):
    """
    Returns (score [B, S], pointers int8 [T, B, S]). score is the log-probability of the most likely path that ends in
    each state at the last frame. pointers tells how many states, 0 to 2, the most likely path to each state advances
    at each frame.

    log_probs: [T, B, columns]; lengths: frames of each utterance [B, 1]; columns: the column of each state [B, S].
    """
    import torch

    # A path may advance by two states, from one token to the next, unless the tokens are equal.
    no_skip = torch.ones_like(columns, dtype=torch.bool)
    no_skip[:, 3::2] = columns[:, 3::2] == columns[:, 1:-2:2]
    exact = torch.float32 if log_probs.device.type == "mps" else torch.float64
    pointers = torch.zeros((len(log_probs), *columns.shape), dtype=torch.int8, device=columns.device)
    score = log_probs[0].to(exact).gather(1, columns)
    score[:, 2:] = -math.inf  # a path begins with the first blank or the first token
    for t in range(1, len(log_probs)):
        one = torch.nn.functional.pad(score, (1, 0), value=-math.inf)[:, :-1]
        two = torch.nn.functional.pad(score, (2, 0), value=-math.inf)[:, :-2].masked_fill(no_skip, -math.inf)
        best, pointers[t] = torch.stack([score, one, two]).max(0)
        score = torch.where(t < lengths, best + log_probs[t].to(exact).gather(1, columns), score)
    return score, pointers


# ---------------------------------------------------------------------------------------------------------------------
# pocketsphinx is an older recogniser of English. pip installs all of it (30 MB). It needs no GPU and runs 60 times
# faster than real time. It knows only the words of its dictionary, and the transcript must have all words that are
# spoken.

SPHINX_STEP = 0.01  # seconds from one frame to the next


def load_sphinx():
    """Two pocketsphinx decoders: one with the default beams, and a slower one with much wider beams."""
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise RuntimeError("pocketsphinx is missing: pip install -e '.[speech]'") from None
    wide = dict(beam=1e-120, wbeam=1e-100, pbeam=1e-120)
    return [Decoder(lm=None, loglevel="FATAL", **beams) for beams in ({}, wide)]


def align_sphinx(waveform, text, decoders):
    """align() for one utterance with pocketsphinx: [(start, end), ...], or a ValueError with the reason."""
    try:
        spoken = []
        for word in text.split():
            forms = spoken_form(word)
            if unspeakable(word) or any(decoders[0].lookup_word(form) is None for form in forms):
                raise ValueError(f"word cannot be aligned: {word!r} is not in pocketsphinx's dictionary")
            spoken += forms
        if not spoken:
            raise ValueError(f"empty transcript: nothing is spoken in {text[:60]!r}")
        samples = (np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes()
        for decoder in decoders:
            timed = decode(decoder, samples, spoken)
            if [word for word, _, _ in timed] == spoken:
                return match_words(text.split(), timed, len(waveform) / SAMPLE_RATE)
        raise ValueError(f"alignment failed: pocketsphinx does not find all of {text[:60]!r} in the audio")
    except ValueError as error:
        return error


def decode(decoder, samples, spoken):
    """Timed words: where a decoder finds the spoken words in 16-bit samples."""
    decoder.set_align_text(" ".join(spoken))
    decoder.start_utt()
    decoder.process_raw(samples, full_utt=True)
    decoder.end_utt()
    timed = []
    for part in decoder.seg() or ():
        word = part.word.split("(")[0]  # "the(2)" is another pronunciation of "the"; "(NULL)" is not a word
        if word and word[0] not in "<[":  # "<s>", "</s>", "<sil>" and "[NOISE]" are not words
            timed.append((word, part.start_frame * SPHINX_STEP, (part.end_frame + 1) * SPHINX_STEP))
    return timed
