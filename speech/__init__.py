"""
Waveforms to units, units to waveforms, and the times of words. Each file holds one concept.

Speech enters the language model as *units*: small integers, 25 per second before runs of the same unit are collapsed to
one. The paper's units come from HuBERT. The demo uses k-means clusters of mel cepstra, which are much cheaper and good
enough for a few synthetic speakers.

    waveform, words = espeak("The cat sat.")                  # float32 at 16 kHz, [(start, end), ...] in seconds
    vocabulary = load_units("data/demo/units")                # of any kind: mel, HuBERT
    [(ids, frame_start)] = vocabulary.encode([waveform])      # uint16 [n], int64 [n]
    offsets = word_units([end for _, end in words], frame_start, n_frames(len(waveform), vocabulary))
    ids[offsets[i]:offsets[i + 1]]                            # the units of word i
    resynthesise(ids, vocabulary)                             # float32 at 16 kHz again

    audio         sound files to waveforms               transcripts   what a transcript sounds like
    espeak        text to a waveform and word times      word_times    word times from TextGrid, ctm, json, .WRD
    units         what all kinds of units share          align         word times from the waveform
    mel, hubert   waveforms to units                     wav2vec       what hubert and align share
    vocoder       units to a waveform
"""
