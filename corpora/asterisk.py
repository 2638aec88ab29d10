"""
Asterisk's core sounds: 554 telephone prompts, 24 minutes of one woman's speech.

    apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-g722
    for package in asterisk-core-sounds-en*.deb; do dpkg -x $package asterisk; done
    python -m corpora.asterisk --source=asterisk --out=data/asterisk --units=data/demo/units \\
        --tokenizer=data/demo/tokenizer.json --aligner=pocketsphinx

Source: two Debian packages. Licence: CC BY-SA 3.0; the voice is Allison Smith's. The sound files need PyAV.

Layout below --source:
    usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz     lines `digits/7: seven`
    usr/share/asterisk/sounds/en_US_f_Allison/digits/7.g722         16 kHz

Text in brackets, as in `[this is a simple beep tone]`, is not spoken and is left out.
"""

import re

from corpora import common, files
from runtime.files import find_files


def find(source, settings):
    return find_files(source, ["core-sounds-en.txt.gz"])


def read(path, settings):
    sounds = path.parents[3] / "share/asterisk/sounds/en_US_f_Allison"
    for line in files.lines(path):
        name, colon, text = line.partition(": ")
        text = re.sub(r"\[[^]]*\]|\([^)]*\)", "", text).strip()
        if line.startswith(";"):
            continue
        if colon and text:
            yield common.Item(name, files.inside(sounds, f"{name}.g722"), text=text)
        else:
            yield common.Bad(name, ValueError(f"no transcript: {line[:60]!r} has no words"))


if __name__ == "__main__":
    common.main("asterisk", find, read)
