"""speech/audio.py: every format is read to its end, in any span; what breaks off, is silent or damaged is refused."""
import io
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest

from speech.audio import SUFFIXES, duration, read_audio

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install -e '.[demo]'")
av = pytest.importorskip("av", reason="PyAV is not installed: pip install -e '.[demo]'")

RATE = 16000


def tone(seconds, pitch=330, rate=RATE):
    """A tone that swells three times a second, of at most 0.3 of full scale."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * pitch * t) * np.sin(3 * np.pi * t)).astype(np.float32)


def with_soundfile(samples, rate=RATE, **options):
    """The bytes of a sound file. samples: [n] or [n, channels]."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    return file.getvalue()


def with_ffmpeg(samples, form, codec, rate=RATE, **options):
    """The same with FFmpeg's encoders. options: of the container."""
    channels = np.atleast_2d(samples.T).astype(np.float32)
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[len(channels)]
    file = tempfile.NamedTemporaryFile()
    with av.open(file.name, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(channels.T.reshape(1, -1), "flt", layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format.name, layout, rate, stream.codec_context.frame_size or 1024)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))
    return file.read()


def mp3(samples, rate=RATE, xing=False):
    return with_ffmpeg(samples, "mp3", "libmp3lame", rate, write_xing="1" if xing else "0")


def holds(read, *parts):
    """Whether a waveform is these parts one after the other, but for short delays and coarse quantisation."""
    assert abs(len(read) - sum(map(len, parts))) < 0.2 * RATE * len(parts)
    spectra = [np.fft.rfft(x, 1 << 20) for x in (read, *parts)]
    correlations = [np.fft.irfft(spectra[0] * spectrum.conj()) for spectrum in spectra[1:]]
    return all(c.max() > 0.9 * (part ** 2).sum() - 1e-3 for c, part in zip(correlations, parts))


@pytest.mark.parametrize("suffix, tolerance", [("wav", 3e-5), ("flac", 3e-5), ("aiff", 3e-5), ("sph", 5e-5)])
def test_spans(tmp_path, suffix, tolerance):
    waveform, path = tone(1.6), tmp_path / f"a.{suffix}"
    path.write_bytes(with_soundfile(waveform, format="NIST" if suffix == "sph" else suffix))
    read = read_audio(str(path))
    assert read.dtype == np.float32 and read.shape == waveform.shape
    assert np.sqrt(np.mean((read - waveform) ** 2)) < tolerance
    assert np.array_equal(read_audio(path.read_bytes(), 0.5), read[8000:])
    assert read_audio(str(path), 1.0, 1.65) == pytest.approx(read[16000:], abs=1e-4)  # the file ends after 1.6 s
    for span in ((-1, None), (5, None), (0, 5), (1, 1)):
        with pytest.raises(ValueError, match="^span outside the audio: "):
            read_audio(str(path), *span)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_other_rates_are_resampled_and_channels_averaged(tmp_path, rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * 0.5
    soundfile.write(tmp_path / "a.wav", np.stack([tone, 0 * tone], 1), rate)
    read = read_audio(str(tmp_path / "a.wav"), 0.2, 0.7)
    want = np.sin(2 * np.pi * 440 * (0.2 + np.arange(8000) / RATE)) * 0.25
    assert len(read) in (8000, 8001) and np.abs(read[400:7600] - want[400:7600]).max() < 2e-3


@pytest.mark.parametrize("form, codec", [("ipod", "aac"), ("webm", "libopus"), ("mp3", "libmp3lame"), ("adts", "aac"),
                                         ("matroska", "pcm_s16le"), ("ogg", "libopus")])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_each_format_is_as_loud_as_a_wav(form, codec, channels):
    """FFmpeg's own way to one channel would make two equal channels 1.41 times as loud."""
    if channels == 8 and codec != "pcm_s16le":  # other codecs treat some of eight channels in a special way
        return
    rate = 48000 if codec == "libopus" else RATE
    sound = np.repeat(3 * tone(2, rate=rate)[:, None], channels, 1)  # 0.9 of full scale
    read = read_audio(with_ffmpeg(sound, form, codec, rate))
    wav = read_audio(with_soundfile(sound, rate, format="WAV"))
    assert (read ** 2).sum() == pytest.approx((wav ** 2).sum(), rel=0.12)  # LAME takes off a twentieth
    assert np.abs(read).max() < 1 and holds(read, wav)


PAUSE = np.zeros(12 * RATE, np.float32)
PICTURE = b"\0image/jpeg\0\3\0\xff\xd8" + np.random.default_rng(0).bytes(100_000)
FRAME = b"APIC" + struct.pack(">I", len(PICTURE)) + b"\0\0" + PICTURE
TAG = b"ID3\3\0\0" + bytes(len(FRAME) >> shift & 127 for shift in (21, 14, 7, 0)) + FRAME
EMPTY_TAG = b"ID3\3\0\0\0\0\0\x0a" + bytes(10)
APE = b"APETAGEX\xd0\7\0\0" + struct.pack("<II", 200, 1) + bytes(12) + b"y" * 168
NUMBER = mp3(tone(2, 500))
SIZE_AT = with_soundfile(tone(3), format="WAV").index(b"data") + 4


def wav_with_size(size, riff_size=None):
    wav = bytearray(with_soundfile(tone(3), format="WAV"))
    wav[SIZE_AT:SIZE_AT + 4] = struct.pack("<I", size)
    if riff_size is not None:
        wav[4:8] = struct.pack("<I", riff_size)
    return bytes(wav)


def flac_of_unknown_length():
    flac = bytearray(with_soundfile(tone(3), format="FLAC"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)  # the number of samples, 36 bits
    return bytes(flac)


@pytest.mark.parametrize("content, wanted", [
    (mp3(np.append(PAUSE, tone(12))), [PAUSE, tone(12)]),  # a header of low bit rate: 32 s by libsndfile
    (mp3(np.append(tone(12), PAUSE)), [tone(12), PAUSE]),
    (mp3(tone(3), xing=True), [tone(3)]),
    (mp3(tone(3), xing=True) + mp3(tone(4, 500), xing=True), [tone(3), tone(4, 500)]),
    (mp3(tone(3)) + b"TAG".ljust(128) + TAG + NUMBER, [tone(3), tone(2, 500)]),
    (mp3(tone(3)) + mp3(np.stack([tone(2, 500, 44100)] * 2, 1), 44100), [tone(3), tone(2, 500)]),
    (TAG + NUMBER, [tone(2, 500)]),
    (2 * with_soundfile(tone(3), format="OGG"), [tone(3), tone(3)]),
    (2 * with_soundfile(tone(3), format="FLAC"), [tone(3), tone(3)]),
    (flac_of_unknown_length(), [tone(3)]),
    (wav_with_size(0), [tone(3)]), (wav_with_size(0, 0), [tone(3)]),  # as programs write to a pipe
    (wav_with_size(0xFFFFFFFF, 0xFFFFFFFF), [tone(3)]), (wav_with_size(0x7FFFFFFF), [tone(3)]),
    (with_ffmpeg(tone(3), "wav", "libmp3lame"), [tone(3)]),
    (mp3(tone(3)) + bytes(5000), [tone(3)]), (mp3(tone(3)) + APE + b"TAG".ljust(128) + NUMBER, [tone(3), tone(2, 500)]),
    (EMPTY_TAG + 2 * with_soundfile(tone(3), format="FLAC"), [tone(3), tone(3)]),
], ids=["pause first", "pause last", "xing", "joined with xing", "joined with tags", "joined, another rate", "picture",
        "joined ogg", "joined flac", "flac of a pipe", "wav 0", "wav 0, riff 0", "wav -1", "wav 2^31", "mp3 in wav",
        "padded", "joined with APE", "joined flac with a tag"])
def test_sound_is_read_to_its_end(tmp_path, content, wanted):
    (tmp_path / "A.SOUND").write_bytes(content)
    read = read_audio(str(tmp_path / "A.SOUND"))
    assert duration(tmp_path / "A.SOUND") == len(read) / RATE
    assert holds(read, *wanted) and np.array_equal(read, read_audio(content))
    if wanted[0] is not PAUSE:  # a silent span is refused
        assert np.array_equal(read_audio(str(tmp_path / "A.SOUND"), 0.5, 1.5), read[8000:24000])


FLAC, WAV, NIST, OGG = (with_soundfile(tone(40), format=form) for form in ("FLAC", "WAV", "NIST", "OGG"))
NAN = with_soundfile(np.array([0.1, np.nan] * 8000), format="WAV", subtype="FLOAT")
SHORTEN = b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00\n".ljust(1024)
HALVES = np.stack([tone(1), -tone(1)], 1)


def cut(content, share=0.7):
    return content[:int(share * len(content))]


@pytest.mark.parametrize("content, reason", [
    (cut(FLAC), "unreadable audio"), (b"this is no sound file\n" * 50, "empty audio: .* has no sound"),
    (with_soundfile(np.zeros(9), 1, format="WAV"), "unreadable audio: .* 1 samples a second"),
    (WAV[:-2], "unreadable audio: .* breaks off"), (NIST[:-2], "unreadable audio: .* breaks off"),
    (OGG[:-10], "unreadable audio: .* breaks off"), (SHORTEN, "unreadable audio: .*convert it: sph2pipe"),
    *((cut(with_soundfile(tone(3), format=form)), "unreadable audio: .*(breaks off|malformed)")
      for form in ("AIFF", "AU", "W64", "RF64", "CAF")),
    (cut(mp3(tone(3), xing=True)), "unreadable audio: .* breaks off"), (WAV + WAV, "unreadable audio"),
    (cut(with_ffmpeg(tone(3), "webm", "libopus")), "unreadable audio: .* breaks off"),
    (cut(with_ffmpeg(tone(3), "mp4", "aac", movflags="+faststart")), "unreadable audio"),
    (b"", "empty audio"), (with_soundfile(np.zeros(0), format="WAV"), "empty audio"), (NAN, "audio is not finite"),
    (FLAC[:21] + b"\xff" * 5 + FLAC[26:], "audio too long"),  # 36 bits of length
    (with_soundfile(np.zeros(RATE), format="WAV"), "silent audio"), (with_soundfile(HALVES, format="WAV"), "silent"),
    (with_soundfile(np.full(RATE, 0.5), format="WAV"), "silent audio"), (mp3(PAUSE), "silent audio"),
    (with_soundfile(3e-4 * tone(1), format="WAV", subtype="FLOAT"), "silent audio")])
def test_unusable_audio_has_a_reason(tmp_path, content, reason):
    (tmp_path / "a.flac").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{reason}") as caught:
        read_audio(str(tmp_path / "a.flac"))
    assert "a.flac" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("form, codec", [("ipod", "aac"), ("webm", "libopus"), ("mp3", "libmp3lame")])
def test_channels_that_cancel_after_lossy_coding(form, codec):
    """What remains is the noise of the codec. One channel alone is half as loud, and no fault."""
    rate = 48000 if codec == "libopus" else RATE
    sound = tone(2, rate=rate)
    with pytest.raises(ValueError, match="^silent audio: the channels of .* cancel"):
        read_audio(with_ffmpeg(np.stack([sound, -sound], 1), form, codec, rate))
    read = read_audio(with_ffmpeg(np.stack([sound, 0 * sound], 1), form, codec, rate))
    assert np.abs(read).max() == pytest.approx(0.15, rel=0.2)


def test_a_name_that_looks_like_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30 note.m4a", "http:x.m4a"):
        Path(name).write_bytes(with_ffmpeg(tone(2), "ipod", "aac"))
        assert holds(read_audio(name), tone(2))


def test_quiet_speech_is_not_silent():
    assert np.abs(read_audio(with_soundfile(1e-3 * tone(1), format="WAV", subtype="FLOAT"))).max() < 1e-3


def test_names_of_sound_files():
    """libsndfile's own list of formats that can be told from their content, and what phones and browsers record."""
    assert {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".au", ".caf", ".m4a", ".webm"} <= {*SUFFIXES}
    assert all(suffix == suffix.lower() for suffix in SUFFIXES)
