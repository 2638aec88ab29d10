"""
Read and write sound files. A waveform is mono float32 at 16 kHz.

libsndfile reads most formats, and any span of a file quickly. It believes the length that the file states. Where that
is an estimate, or the length of the first of several parts, FFmpeg (PyAV) decodes the file to its end. A file that
breaks off is an error, and so is silence.
"""
import contextlib
import functools
import io
import itertools
import math
import mmap
import os
import re
from typing import NamedTuple

import numpy as np
from scipy.signal import resample_poly

from runtime.files import one_line

SAMPLE_RATE = 16000

SLACK = 0.1  # seconds by which a span may exceed the audio, because manifests and transcripts round
SILENCE = 1e-4  # share of full scale (-80 dB); a recording without a louder sample is silent
CANCELLED = 0.01  # share of the power of its channels below which their mean is noise
MIN_RATE, MAX_RATE = 4000, 384000  # Hz
MAX_SAMPLES = 1 << 28  # in one span, and in a file that FFmpeg decodes
# Names of sound files end like this, in upper or lower case. How a file is read depends on its content.
SUFFIXES = tuple((".wav .wave .flac .ogg .oga .ogv .opus .spx .mp3 .mp2 .mpga .mpeg .m4a .m4b .m4r .mp4 .mov .3gp .3g2 "
                  ".aac .ac3 .amr .webm .weba .mka .mkv .avi .flv .wma .wmv .aiff .aif .aifc .au .snd .caf .w64 .rf64 "
                  ".wv .ape .tta .voc .gsm .raw .pcm .sph .nist .g722").split())
NOT_FOR_LIBSNDFILE = (1, 4)  # its codes for an unknown format and for an encoding that it lacks
# libsndfile's note on a wav, AIFF, AU, W64 or RF64 file that is shorter than it states
CUT_SHORT = re.compile(r"(?:data|SSND|BODY|Data Size|[Rr]iff size|riff)\s*: (\d+) \(should be (\d+)\)")
STREAMS = dict(FLAC=b"fLaC\0\0\0\x22", OGG=b"OggS\0\2")  # {libsndfile's name of a format: how a stream of it starts}
ID3 = re.compile(rb"ID3[\2-\4]\0[\0-\xf0]([\0-\x7f]{4})")  # starts a tag in an mp3; its size has 4 times 7 bits
XING = re.compile(rb"(?:Xing|Info)\0\0\0[\1\3\5\7\x09\x0b\x0d\x0f](.{4})", re.DOTALL)  # states the frames of an mp3
NO_SOUND = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3")  # how tags in an mp3 start
EXACT = ("mov", "matroska", "asf")  # FFmpeg's names of containers that state their length and not an estimate


class Sound(NamedTuple):
    """An open sound file."""
    rate: int       # samples a second
    n_samples: int  # in each channel
    read: object    # function (first, last + 1) -> float32 [n], the mean of all channels


def read_audio(path, start=0.0, end=None, longest=math.inf):
    """
    Read a sound file, or its span [start, end) in seconds, as float32 [n] at 16 kHz.

    path: a file of any format that libsndfile or FFmpeg reads (SPHERE only if it is PCM), or the bytes of one.
    longest: the longest span that is accepted, in seconds. Channels are averaged; other rates are resampled.
    Raises ValueError "unreadable audio: ...", "empty audio: ...", "audio is not finite: ...", "audio too long: ...",
    "silent audio: ..." or "span outside the audio: ...", and RuntimeError if PyAV is needed and missing.
    """
    name = name_of(path)
    with open_sound(path) as sound:
        first, last = find_span(sound, name, start, end, longest)
        samples = sound.read(first, last)
    if first == last:
        raise ValueError(f"empty audio: [{start}, {end}) holds no sample of {name}")
    if len(samples) < max(1, last - first - SLACK * sound.rate):
        broken, seconds = (first + len(samples)) / sound.rate, sound.n_samples / sound.rate
        raise ValueError(f"unreadable audio: {name} breaks off after {broken:.2f} of {seconds:.2f} s")
    check_sound(samples, name)
    return resample(samples, sound.rate)


def find_span(sound, name, start, end, longest):
    """(first, last + 1) of the samples in a span of an open sound file. Raises ValueError for a span that is wrong."""
    rate, seconds = sound.rate, sound.n_samples / sound.rate
    end = seconds if end is None else end
    if not 0 <= start < min(end, seconds) or end > seconds + SLACK:
        raise ValueError(f"span outside the audio: [{start:g}, {end:g}) of {seconds:.2f} s in {name}")
    first, last = round(start * rate), min(round(end * rate), sound.n_samples)
    if last - first > min(longest * rate, MAX_SAMPLES):
        raise ValueError(f"audio too long: {(last - first) / rate:.0f} s of {name}; give shorter spans")
    return first, last


def check_sound(waveform, name):
    """Raise ValueError if a waveform [n], n > 0, is not finite or silent, for example because its channels cancel."""
    if not np.isfinite(waveform).all():
        raise ValueError(f"audio is not finite: {name} has NaN or infinite samples")
    if np.abs(waveform - waveform.mean()).max() < SILENCE:
        raise ValueError(f"silent audio: {name} stays below {20 * math.log10(SILENCE):.0f} dB of full scale")


def duration(path):
    """The length of a sound file in seconds. Raises ValueError and RuntimeError as read_audio does."""
    with open_sound(path) as sound:
        return sound.n_samples / sound.rate


def name_of(path):
    return "sound in a record" if isinstance(path, bytes) else os.fspath(path)


@contextlib.contextmanager
def open_sound(path):
    """A context with the Sound of a file, or of the bytes of one. Raises ValueError and RuntimeError."""
    import soundfile

    name = name_of(path)
    try:
        file = open_with_libsndfile(path, name)
        if file is None:
            samples = decode(path, name) if isinstance(path, bytes) else decode_file(name, os.stat(path).st_mtime_ns)
            yield Sound(SAMPLE_RATE, len(samples), lambda first, last: samples[first:last])
            return
        with file:
            def read(first, last):
                file.seek(first)
                return mix(file.read(last - first, "float32", always_2d=True), name)
            yield Sound(check_rate(file.samplerate, name), file.frames, read)
    except (soundfile.LibsndfileError, OSError, MemoryError, UnicodeError) as error:
        raise ValueError(f"unreadable audio: {name.encode(errors='replace').decode()} ({one_line(error)})") from None


def mix(samples, name):
    """The mean of all channels: [n, channels] -> [n]. Raises ValueError if the channels cancel.

    After lossy coding, channels of opposite sign leave a little noise and no silence.
    """
    mean = samples.mean(1)
    if samples.shape[1] > 1 and np.square(mean).sum() < CANCELLED * np.square(samples).mean(1).sum():
        raise ValueError(f"silent audio: the channels of {name} cancel; take one of them")
    return mean


def check_rate(rate, name):
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"unreadable audio: {name} says {rate} samples a second")
    return rate


# ---------------------------------------------------------------------------------------------------------------------
# with libsndfile

def open_with_libsndfile(path, name):
    """The soundfile.SoundFile of a file or of bytes, or None if libsndfile cannot read it, or perhaps not to its end.

    Raises ValueError for a file that breaks off.
    """
    import soundfile

    in_memory = isinstance(path, bytes)
    with io.BytesIO(path) if in_memory else open(path, "rb") as raw:
        head, size = raw.read(1024), raw.seek(0, os.SEEK_END)
    if size == 0:
        raise ValueError(f"empty audio: {name} has no bytes")
    if head.startswith(b"NIST_1A") and size < (stated := sphere_length(head, name)):
        raise ValueError(f"unreadable audio: {name} breaks off: {size} bytes, by its header {stated}")
    if name.lower().endswith(".g722"):  # has no header, so libsndfile could take it for anything
        return None
    try:
        file = soundfile.SoundFile(io.BytesIO(path) if in_memory else path)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a name like a.raw, which needs more settings
        if getattr(error, "code", 1) not in NOT_FOR_LIBSNDFILE:
            raise  # a damaged file, of which FFmpeg would return a part
        return None
    for stated, found in CUT_SHORT.findall(file.extra_info):
        # A program that writes to a pipe does not know the length, and states 0 or about 2^31 or 2^32 bytes.
        if int(found) + 1 < int(stated) and not 0x70000000 <= int(stated) <= 0xFFFFFFFF:
            raise ValueError(f"unreadable audio: {name} breaks off: {found} bytes, by its header {stated}")
    knows_length = 0 < file.frames < 1 << 62 and file.format != "MP3" and not file.subtype.startswith("MPEG")
    if knows_length and (start := STREAMS.get(file.format)):
        knows_length = (is_one_stream(path, start, name) if in_memory
                        else file_is_one_stream(name, start, os.stat(path).st_mtime_ns))
    if knows_length:
        return file
    file.close()
    return None


def sphere_length(head, name):
    """The size in bytes that a SPHERE header states. Raises ValueError for a damaged header or compressed samples."""
    if b"shorten" in head:
        raise ValueError(f"unreadable audio: {name} is compressed with shorten; convert it: sph2pipe -f wav")
    header = re.match(rb"NIST_1A\s+(\d+)\s", head)
    sizes = re.findall(rb"^(?:sample_count|channel_count|sample_n_bytes) -i (\d+)\s", head, re.MULTILINE)
    if not header or len(sizes) != 3:
        raise ValueError(f"unreadable audio: {name} has no whole SPHERE header")
    return int(header[1]) + math.prod(map(int, sizes))


@functools.lru_cache(maxsize=256)  # many spans of a recording may be read
def file_is_one_stream(name, start, modified):
    with open(name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return is_one_stream(data, start, name)


def is_one_stream(data, start, name):
    """Whether a FLAC or Ogg file (bytes or mmap) has one stream. Of several, libsndfile reads the first.

    start: how a stream starts. Raises ValueError if the last page of an Ogg file is not complete.
    """
    if start == STREAMS["OGG"]:
        page = data.rfind(b"OggS")
        segments = data[page + 27:page + 27 + data[page + 26]] if page + 26 < len(data) else b""
        if page + 27 + len(segments) + sum(segments) != len(data):
            raise ValueError(f"unreadable audio: {name} breaks off in its last page")
    return data.find(start, data.find(start) + 1) < 0


# ---------------------------------------------------------------------------------------------------------------------
# with FFmpeg

@functools.lru_cache(maxsize=1)  # the spans of a recording are read one after the other
def decode_file(name, modified):
    return decode(name, name)


def decode(source, name):
    """Decode a file, or the bytes of one, to its end: float32 [n] at 16 kHz, the mean of all channels.

    Raises ValueError "unreadable audio: ..." or "audio too long: ...", and RuntimeError if PyAV is missing.
    """
    try:
        import av
    except ImportError:
        raise RuntimeError(f"PyAV, which {name} needs, is missing: pip install av") from None

    source, promised_frames = read_mp3(source)
    source = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"  # a name may look like an address
    pieces, n_frames, seconds = [], 0, 0.0
    try:
        with av.open(source, metadata_errors="ignore") as container:
            promised_seconds = stated_seconds(container)
            # In a file of several parts, the parts may have different rates and numbers of channels.
            for (rate, layout, n_channels), frames in itertools.groupby(sound_frames(container), frame_format):
                to_float, part = av.AudioResampler("flt", layout, check_rate(rate, name)), []
                for frame in itertools.chain(frames, [None]):  # None: what the resampler has not returned yet
                    part += [out.to_ndarray().reshape(-1, n_channels) for out in to_float.resample(frame)]
                    n_frames += frame is not None
                    seconds += frame.samples / rate if frame else 0
                    if seconds * SAMPLE_RATE > MAX_SAMPLES:
                        raise ValueError(f"audio too long: over {seconds:.0f} s in {name}; convert it to flac or wav")
                pieces.append(resample(mix(np.concatenate(part), name), rate))
    except (av.FFmpegError, IndexError) as error:  # IndexError: the file has no sound in it
        raise ValueError(f"unreadable audio: {name} ({one_line(error)})") from None
    if not pieces:
        raise ValueError(f"empty audio: {name} has no sound in it")
    if n_frames + 3 < promised_frames or seconds + 3 * SLACK < promised_seconds:
        raise ValueError(f"unreadable audio: {name} breaks off after {seconds:.2f} s")
    return np.concatenate(pieces)


def frame_format(frame):
    return frame.sample_rate, frame.layout.name, len(frame.layout.channels)


def sound_frames(container):
    """Yield the frames of the sound in a container. Padding and tags are skipped; other damage raises av's error."""
    import av

    for packet in container.demux(audio=0):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            start = bytes(packet)[:16]
            if start.strip(b"\0") and not start.startswith(NO_SOUND):
                raise
            frames = []
        yield from frames


def stated_seconds(container):
    """The length of the sound by the file's header, or 0 if the header has only an estimate of it."""
    stream, is_exact = container.streams.audio[0], container.format.name.split(",")[0] in EXACT
    if is_exact and stream.duration:
        return float(stream.duration * stream.time_base)
    if is_exact and container.duration and len(container.streams) == 1:  # otherwise it may be the length of a video
        return container.duration / 1e6
    return 0.0


def read_mp3(source):
    """(bytes, frames stated by the header or 0) of an mp3, or (source, 0) for what does not begin like one.

    The tags are removed. FFmpeg would take a tag between two joined parts for damaged sound.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        if not re.match(rb"ID3|\xff[\xe0-\xff]", file.read(3)):
            return source, 0
        file.seek(0)
        data = file.read()
    pieces, at = [], 0
    while tag := ID3.search(data, at):
        a, b, c, d = tag[1]
        pieces.append(data[at:tag.start()])
        at = tag.end() + (a << 21 | b << 14 | c << 7 | d)
    data = b"".join([*pieces, data[at:]])
    header = XING.search(data, 0, 1024)
    return data, int.from_bytes(header[1]) if header else 0


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
