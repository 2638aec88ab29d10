"""
Sound files to waveforms: mono float32 at 16 kHz.
"""
import io
import math
import os
import re

import numpy as np
from scipy.signal import resample_poly

from runtime.files import one_line

SAMPLE_RATE = 16000

SLACK = 0.1  # seconds: manifests and transcripts round, so a span may end that much after the audio does
RATES, MAX_SAMPLES, BLOCK = (4000, 384000), 1 << 28, 1 << 20  # Hz; of one span; read at once, of all channels
AV_SUFFIXES = (".g722", ".m4a", ".mp4", ".webm")  # what libsndfile cannot read


def read_audio(path, start=0.0, end=None, longest=math.inf):
    """
    A sound file, or the span [start, end) of it in seconds, as mono float32 [n] at 16 kHz.

    path: of a wav, flac, ogg, mp3 or NIST SPHERE (PCM) file, or the bytes of one; g722, m4a, mp4 and webm go through
    PyAV. Only the span is read, of up to `longest` seconds; any rate is resampled, channels are averaged.
    Raises ValueError "unreadable audio: ...", "empty audio: ...", "audio is not finite: ...", "audio too long: ..." or
    "span outside the audio: ...".
    """
    import soundfile

    name = "sound in a record" if isinstance(path, bytes) else path
    try:
        with io.BytesIO(path) if isinstance(path, bytes) else open(path, "rb") as file:
            check_length(file, name)
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(AV_SUFFIXES):
            path = decode_with_av(path)
        with soundfile.SoundFile(io.BytesIO(path) if isinstance(path, bytes) else path) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
            if not RATES[0] <= rate <= RATES[1]:
                raise ValueError(f"unreadable audio: {name} says {rate} samples a second")
            if file.frames == 0:
                raise ValueError(f"empty audio: {name} has no samples")
            if not 0 <= start < min(seconds, math.inf if end is None else end) or (end or 0) > seconds + SLACK:
                raise ValueError(f"span outside the audio: [{start}, {end}) of {seconds:.2f} s in {name}")
            first, last = round(start * rate), file.frames if end is None else min(round(end * rate), file.frames)
            if last - first > min(longest * rate, MAX_SAMPLES):
                raise ValueError(f"audio too long: {(last - first) / rate:.0f} s of {name}; give shorter spans")
            file.seek(first)
            blocks = [np.zeros(0, np.float32)]  # by and by: what is there may be far less than the header says
            while len(block := file.read(min(BLOCK // file.channels, last - file.tell()), "float32", always_2d=True)):
                blocks.append(block.mean(1))
            samples = np.concatenate(blocks)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"unreadable audio: {name} ({' '.join(str(error).split())})") from None
    if len(samples) == 0:
        raise ValueError(f"empty audio: [{start}, {end}) holds no sample of {name}")
    if len(samples) < last - first - SLACK * rate:
        broken = (first + len(samples)) / rate
        raise ValueError(f"unreadable audio: {name} breaks off after {broken:.2f} of {seconds:.2f} s")
    if not np.isfinite(samples).all():
        raise ValueError(f"audio is not finite: {name} has NaN or infinite samples")
    return resample(samples, rate)


def check_length(file, name):
    """ValueError if a sound file has no bytes, fewer than its SPHERE or wav header says, or those of shorten.

    libsndfile makes do with the bytes that are there. A wav written to a pipe says 0 or about 1 << 31 or 1 << 32.
    """
    head, there, needed = file.read(1024), file.seek(0, os.SEEK_END), 0
    if not head:
        raise ValueError(f"empty audio: {name} has no bytes")
    if head.startswith(b"NIST_1A"):
        if b"shorten" in head:
            raise ValueError(f"unreadable audio: {name} is compressed with shorten; convert it: sph2pipe -f wav")
        said = re.findall(rb"\n(?:sample_count|channel_count|sample_n_bytes) -i (\d{1,12})[ \t\r]*(?=\n)", head)
        start = re.match(rb"NIST_1A\r?\n *(\d{1,12})[ \t\r]*\n", head)
        if not start or len(said) != 3:
            raise ValueError(f"unreadable audio: {name} has no whole SPHERE header")
        needed = int(start[1]) + math.prod(map(int, said))
    elif head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        at = 12
        for _ in range(1000):  # chunks: a name, its size, as many bytes, and one more if they are odd
            file.seek(at)
            chunk, size = file.read(4), int.from_bytes(file.read(4), "little")
            if chunk == b"data":
                needed = at + 8 + size if size < 0x7FFF0000 else 0
                break
            at += 8 + size + size % 2
    if needed > there:
        raise ValueError(f"unreadable audio: {name} breaks off: {there} bytes, by its header {needed}")


def resample(samples, rate):
    """float32 [n] at any rate in Hz -> float32 at 16 kHz."""
    if rate == SAMPLE_RATE:
        return samples
    divisor = math.gcd(SAMPLE_RATE, rate)
    return resample_poly(samples, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32)


def decode_with_av(path):
    """A whole file that FFmpeg can decode as the bytes of a wav; ValueError "unreadable audio: ..."."""
    import soundfile

    try:
        import av
    except ImportError:
        raise RuntimeError(f"PyAV, which {path} needs, is missing: pip install av") from None
    try:
        with av.open(os.fspath(path)) as container:
            rate = container.streams.audio[0].rate
            resampler = av.AudioResampler("flt", "mono", rate)
            frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
            samples = [frame.to_ndarray()[0] for frame in frames + resampler.resample(None)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"unreadable audio: {path} ({one_line(error)})") from None
    out = io.BytesIO()
    soundfile.write(out, np.concatenate(samples or [np.zeros(0, np.float32)]), rate, format="WAV", subtype="FLOAT")
    return out.getvalue()


def write_audio(path, waveform):
    """Write float [n] at 16 kHz to a .wav or .flac. What is louder than full scale is made softer as a whole."""
    import soundfile

    soundfile.write(path, waveform / max(1.0, np.abs(waveform).max(initial=0)), SAMPLE_RATE)
