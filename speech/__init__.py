"""
Turn waveforms into units and units into waveforms, and find the times of words. Each file holds one concept.

Speech enters the language model as *units*: small integers, one for each frame of 40 ms. Each run of the same unit is
then collapsed to one unit. The paper's units are k-means clusters of HuBERT features. The demo clusters mel cepstra
instead, which are much cheaper to compute and good enough for a few synthetic speakers.

    waveform, words = espeak("The cat sat.")                  # float32 at 16 kHz, [(start, end), ...] in seconds
    vocabulary = load_units("data/demo/units")                # mel or HuBERT units
    [(ids, frame_start)] = vocabulary.encode([waveform])      # uint16 [n], int64 [n]
    offsets = word_units([end for _, end in words], frame_start, n_frames(len(waveform), vocabulary))
    ids[offsets[i]:offsets[i + 1]]                            # the units of word i
    resynthesise(ids, vocabulary)                             # float32 at 16 kHz again

    audio         sound files to waveforms               transcripts   the spoken form of a transcript
    espeak        text to a waveform and word times      word_times    word times from TextGrid, ctm, json, .WRD
    units         what all kinds of units share          align         word times from waveform and transcript
    mel, hubert   waveforms to units                     wav2vec       what hubert and align share
    vocoder       units to a waveform
"""
