"""
Read and write sound files. A waveform is mono float32 at 16 kHz.

libsndfile reads a truncated file as if it were a shorter one. Here a truncated file is an error.
"""
import io
import math
import os
import re

import numpy as np
from scipy.signal import resample_poly

from runtime.files import one_line

SAMPLE_RATE = 16000

SLACK = 0.1  # seconds by which a span may exceed the audio, because manifests and transcripts round
MIN_RATE, MAX_RATE = 4000, 384000  # Hz
MAX_SAMPLES = 1 << 28  # in one span
AV_SUFFIXES = (".g722", ".m4a", ".mp4", ".webm")  # libsndfile cannot read these formats, PyAV can


def read_audio(path, start=0.0, end=None, longest=math.inf):
    """
    Read a sound file, or its span [start, end) in seconds, as float32 [n] at 16 kHz.

    path: a wav, flac, ogg, mp3, NIST SPHERE (PCM), g722, m4a, mp4 or webm file, or the bytes of one of the first five.
    longest: the longest span that is accepted, in seconds. Channels are averaged; other rates are resampled.
    Raises ValueError "unreadable audio: ...", "empty audio: ...", "audio is not finite: ...", "audio too long: ..." or
    "span outside the audio: ...".
    """
    import soundfile

    in_memory = isinstance(path, bytes)
    name = "sound in a record" if in_memory else os.fspath(path)
    try:
        check_length(path, name)
        source = io.BytesIO(path) if in_memory else path
        with soundfile.SoundFile(decode_with_av(path) if name.endswith(AV_SUFFIXES) else source) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
            first, last = find_span(file, name, start, end, longest)
            file.seek(first)
            samples = file.read(last - first, "float32", always_2d=True).mean(1)  # [n, channels] -> [n]
    except (soundfile.LibsndfileError, OSError, MemoryError) as error:
        raise ValueError(f"unreadable audio: {name} ({one_line(error)})") from None
    if first == last:
        raise ValueError(f"empty audio: [{start}, {end}) holds no sample of {name}")
    if len(samples) < max(1, last - first - SLACK * rate):
        broken = (first + len(samples)) / rate
        raise ValueError(f"unreadable audio: {name} breaks off after {broken:.2f} of {seconds:.2f} s")
    if not np.isfinite(samples).all():
        raise ValueError(f"audio is not finite: {name} has NaN or infinite samples")
    return resample(samples, rate)


def find_span(file, name, start, end, longest):
    """(first, last + 1) of the samples in a span of an open sound file. Raises ValueError for a span that is wrong."""
    rate, seconds = file.samplerate, file.frames / file.samplerate
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"unreadable audio: {name} says {rate} samples a second")
    if file.frames == 0:
        raise ValueError(f"empty audio: {name} has no samples")
    end = seconds if end is None else end
    if not 0 <= start < min(end, seconds) or end > seconds + SLACK:
        raise ValueError(f"span outside the audio: [{start:g}, {end:g}) of {seconds:.2f} s in {name}")
    first, last = round(start * rate), min(round(end * rate), file.frames)
    if last - first > min(longest * rate, MAX_SAMPLES):
        raise ValueError(f"audio too long: {(last - first) / rate:.0f} s of {name}; give shorter spans")
    return first, last


def check_length(path, name):
    """Raise ValueError if a file, or the bytes of one, is empty or shorter than its SPHERE or wav header promises."""
    promised = 0
    with io.BytesIO(path) if isinstance(path, bytes) else open(path, "rb") as file:
        head = file.read(1024)
        if head.startswith(b"NIST_1A"):
            promised = sphere_length(head, name)
        elif head.startswith(b"RIFF"):
            file.seek(12)
            while chunk := file.read(8):  # name and size of a chunk
                length = int.from_bytes(chunk[4:], "little")
                if chunk.startswith(b"data"):
                    promised = file.tell() + length if length < 0x7FFF0000 else 0  # wavs from pipes hold a dummy size
                    break
                file.seek(length + length % 2, os.SEEK_CUR)
        size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ValueError(f"empty audio: {name} has no bytes")
    if size < promised:
        raise ValueError(f"unreadable audio: {name} breaks off: {size} bytes, by its header {promised}")


def sphere_length(head, name):
    """The size in bytes that a SPHERE header states. Raises ValueError for a damaged header or compressed samples."""
    if b"shorten" in head:
        raise ValueError(f"unreadable audio: {name} is compressed with shorten; convert it: sph2pipe -f wav")
    header = re.match(rb"NIST_1A\s+(\d+)\s", head)
    sizes = re.findall(rb"^(?:sample_count|channel_count|sample_n_bytes) -i (\d+)\s", head, re.MULTILINE)
    if not header or len(sizes) != 3:
        raise ValueError(f"unreadable audio: {name} has no whole SPHERE header")
    return int(header[1]) + math.prod(map(int, sizes))


def decode_with_av(path):
    """Decode a whole file with FFmpeg into a wav file in memory. Raises ValueError "unreadable audio: ..."."""
    import soundfile

    try:
        import av
    except ImportError:
        raise RuntimeError(f"PyAV, which {path} needs, is missing: pip install av") from None
    samples = [np.zeros(0, np.float32)]
    try:
        with av.open(os.fspath(path)) as container:
            rate = container.streams.audio[0].rate
            resampler = av.AudioResampler("flt", "mono", rate)
            for frame in [*container.decode(audio=0), None]:  # None flushes the resampler
                samples += [part.to_ndarray()[0] for part in resampler.resample(frame)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"unreadable audio: {path} ({one_line(error)})") from None
    wav = io.BytesIO()
    soundfile.write(wav, np.concatenate(samples), rate, format="WAV", subtype="FLOAT")
    wav.seek(0)
    return wav


def resample(samples, rate):
    """Resample float32 [n] from any rate in Hz to 16 kHz."""
    if rate == SAMPLE_RATE:
        return samples
    divisor = math.gcd(SAMPLE_RATE, rate)
    return resample_poly(samples, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32)


def write_audio(path, waveform):
    """Write float [n] at 16 kHz to a .wav or .flac file. A waveform that exceeds full scale is scaled down."""
    import soundfile

    soundfile.write(path, waveform / max(1.0, np.abs(waveform).max(initial=0)), SAMPLE_RATE)
