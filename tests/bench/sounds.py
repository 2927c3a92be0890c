"""Made sounds: tones of known pitch for CREPE, and voices for Resemblyzer, each from a seed."""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor

RATE = 16_000  # samples a second, what both networks take
FRAME = 1024  # samples of a frame of CREPE
SECONDS, SYLLABLE = 1.6, 0.2  # of a voice, 160 frames of Resemblyzer, and of each syllable in it
VOWELS = (
    (270, 2290, 3010), (390, 1990, 2550), (530, 1840, 2480), (660, 1720, 2410), (730, 1090, 2440), (570, 840, 2410),
    (440, 1020, 2240), (300, 870, 2240), (640, 1190, 2390), (490, 1350, 1690),
)  # fmt: skip
"""Hz of the first three formants, men's means (Peterson & Barney 1952)."""
WIDTHS = (60.0, 90.0, 150.0)  # Hz, of the three formants


def tones(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of tones, (number, 1024), normalized as CREPE takes them, and the pitch in the middle of each.

    Each is up to ten harmonics of 60 to 1000 Hz that fall off by a random power, with a vibrato of up to 50 cents at 4
    to 8 Hz, in white noise 0 to 30 dB below it. A pitch is in cents above 10 Hz.
    """
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(number, 1, generator=generator, dtype=torch.double)

    times = (torch.arange(FRAME, dtype=torch.double) - FRAME // 2) / RATE
    base, depth, start = between(math.log2(60), math.log2(1000)), between(0, 50), between(0, 2 * math.pi)
    hertz = 2 ** (base + depth * (2 * math.pi * between(4, 8) * times + start).sin() / 1200)
    phase, fall = 2 * math.pi * hertz.cumsum(1) / RATE, between(0.5, 2)
    sound = torch.zeros(number, FRAME, dtype=torch.double)
    for harmonic in range(1, 11):
        heard = harmonic * hertz < RATE / 2
        sound += heard * harmonic**-fall * (harmonic * phase + between(0, 2 * math.pi)).sin()
    noise = torch.randn(sound.shape, generator=generator, dtype=torch.double)
    sound += noise * sound.std(1, keepdim=True) * 10 ** (-between(0, 30) / 20)
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    cents = 1200 * (base - math.log2(10)) + depth * start.sin()
    return sound.float(), cents.squeeze(1).float()


def voices(number: int, seed: int) -> Tensor:
    """Mel spectrograms, (number, 160, 40), of voices that each say eight vowels, as Resemblyzer takes them."""
    from librosa.feature import melspectrogram

    random = numpy.random.default_rng(seed)
    spectrograms = [
        melspectrogram(y=_voice(random), sr=RATE, n_fft=400, hop_length=160, n_mels=40).T[:160] for _ in range(number)
    ]
    return torch.tensor(numpy.stack(spectrograms), dtype=torch.float32)


def _voice(random: numpy.random.Generator) -> numpy.ndarray:
    """Harmonics of a gliding pitch, as loud as the formants of vowels make them, with some breath, at -30 dBFS."""
    times = numpy.arange(int(SECONDS * RATE)) / RATE
    syllables = round(SECONDS / SYLLABLE)
    middles = SYLLABLE * (numpy.arange(syllables) + 0.5)
    pitch = 85 * 3 ** random.random()  # a low voice to a high one, whose vocal tract is the shorter
    tract = 0.9 + 0.3 * math.log(pitch / 85, 3) + random.normal(0, 0.04)
    hertz = pitch * 2 ** numpy.interp(times, middles, random.normal(0, 0.15, syllables))
    vowels = numpy.array(VOWELS)[random.integers(len(VOWELS), size=syllables)] * tract
    formants = [numpy.interp(times, middles, vowels[:, index]) for index in range(3)]
    phase = 2 * math.pi * numpy.cumsum(hertz) / RATE
    sound = random.normal(0, 0.01, len(times))
    for harmonic in range(1, int(RATE / 2 / hertz.max())):
        ratio = [harmonic * hertz / formant for formant in formants]
        gains = [
            ((1 - r**2) ** 2 + (r * width / formant) ** 2) ** -0.5
            for r, formant, width in zip(ratio, formants, WIDTHS, strict=True)
        ]
        sound += numpy.prod(gains, axis=0) * numpy.sin(harmonic * phase) / harmonic
    sound *= 0.05 + numpy.sin(math.pi * times / SYLLABLE) ** 2  # syllables
    return sound / numpy.sqrt(numpy.mean(sound**2)) * 10 ** (-30 / 20)
