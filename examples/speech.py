"""Digits out of speech: mel spectrograms, a bidirectional GRU, CTC, and voices in the test that training never heard.

    pip install -e ".[examples,speech]" && python examples/speech.py       # about two minutes on two cores
    python examples/speech.py --full                                       # more speech, a larger network, for longer

The speech is SYNTHETIC: eSpeak NG speaks strings of three to seven digits, in six accents of English, forty voices,
many speeds and pitches, and noise is added. Ten other voices are kept for the test. They are settings of the same
synthesiser (formants, pitch, breath), and so differ less than people do: these error rates show that the method works,
and say nothing of how well it would do on recorded speech. None was found, with transcripts, that installs from a
package. eSpeak NG comes with the package espeakng-loader; its licence is the GPL, version 3, so that it has an extra of
its own.

CTC learns where the digits are from the strings alone. Decoding is greedy, and by a beam of prefixes. The same loss
trains a network without recurrence, which sees one step of 23 ms at a time: what is missing there is context.

What it printed by default, after 178 seconds of processor time, most of them for the recurrent network:

    wrong digits, and strings with a wrong digit, %, of 300 strings in each test
                                   bidirectional GRU             no recurrence            GRU, beam of 8
    training voices                      1.44    6.0              54.86   95.7               1.44    6.0
    new voices, 20 dB                    3.41   14.0              61.84   96.7               3.62   14.3
    new voices, 10 dB                    5.32   20.7              63.55   95.3               5.05   19.7
    new voices, 0 dB                    14.88   42.0              75.15   99.3              14.81   42.3

With --full, after 862 (logs/speech-full.txt):

    training voices                      0.84    3.7              31.88   81.0               0.84    3.7
    new voices, 20 dB                    2.18    9.3              42.80   82.7               2.05    9.0
    new voices, 10 dB                    3.07   12.0              46.83   86.7               2.94   11.7
    new voices, 0 dB                    12.08   34.3              58.50   92.7              12.01   34.3
"""

import ctypes

import jax
import matplotlib
import numpy as np

import jrnn
import shared
from jrnn import decoding
from jrnn.training import fit, make_step, ragged_batches, schedule

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BLANK = 0  # the label of a digit is the digit plus one
MOST = 7  # digits of a string
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc")
# What eSpeak NG calls variants, without its robots and whispers, and without those nearly the same as another.
VOICES = (
    "f1", "f2", "f3", "f5", "m1", "m2", "m3", "m5", "m6", "m8", "Alex", "Alicia", "Andrea", "Andy", "Gene", "Hugo",
    "Jacky", "Lee", "Michael", "Mike", "Reed", "Storm", "anika", "antonio", "benjamin", "boris", "ed", "grandpa", "ian",
    "iven", "linda", "max", "pablo", "paul", "rob", "robert", "sandro", "travis", "victor", "zac",
)  # fmt: skip
TEST_VOICES = ("f4", "m4", "m7", "Annie", "Denis", "Marco", "david", "quincy", "shelby", "steph")
BATCH = 32
FEATURES, STEP, WINDOW = 32, 256, 512  # mel bands; samples between frames and in one frame, at 22,050 Hz
JOINED = 2  # frames in one step of the network
PADDED = (0.4, 0.8, 1.0)  # quantiles of the lengths, to which utterances are padded: every shape costs a compilation
LOUDNESS = (0, 20)  # dB of the speech over the noise


class Synthesiser:
    """eSpeak NG's library, called by ctypes: the names and constants are those of its header, speak_lib.h."""

    SYNCHRONOUS, DONT_EXIT, UTF8, CHARACTER, RATE, PITCH = 2, 0x8000, 1, 1, 1, 3

    def __init__(self):
        import espeakng_loader  # here, so that the rest of the module does not need it

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, data, self.DONT_EXIT)
        if self.sample_rate <= 0:
            raise OSError("eSpeak NG did not start; is the package espeakng-loader whole?")
        size, number, pointer = ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p
        self.library.espeak_Synth.argtypes = [
            ctypes.c_char_p, size, number, ctypes.c_int, number, number, pointer, pointer
        ]  # fmt: skip
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.pieces, self.callback = [], kind(self._take)  # kept: the library calls it later
        self.library.espeak_SetSynthCallback(self.callback)

    def _take(self, samples, count, events):
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float32) / 2**15)
        return 0

    def speak(self, text, accent, voice, words_a_minute, pitch):
        """Samples ``(n,)`` from -1 to 1; ``pitch`` goes from 0 to 100."""
        self.pieces.clear()
        if self.library.espeak_SetVoiceByName(f"{accent}+{voice}".encode()):
            raise ValueError(f"eSpeak NG has no voice {accent}+{voice}")
        self.library.espeak_SetParameter(self.RATE, words_a_minute, 0)
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, self.CHARACTER, 0, self.UTF8, None, None)
        return np.concatenate(self.pieces)


def add_noise(rng, samples, loudness):
    """Noise whose power falls with frequency, as white noise or faster, this many dB below the speech."""
    white = np.fft.rfft(rng.standard_normal(1 << len(samples).bit_length()))  # a power of two: the transform is fast
    frequency = np.arange(len(white)) + 20.0
    noise = np.fft.irfft(white * frequency ** -rng.uniform(0, 1))[: len(samples)]
    scale = np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-loudness / 20)
    return (samples + scale * noise).astype(np.float32)


def mel_filters(sample_rate, lowest=80.0, highest=8000.0):
    """Triangles ``(WINDOW // 2 + 1, FEATURES)``, evenly spaced on the mel scale, each from its neighbours' peaks."""
    mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)
    edges = 700 * (10 ** (np.linspace(mel(lowest), mel(highest), FEATURES + 2) / 2595) - 1)
    left, peak, right = edges[:-2], edges[1:-1], edges[2:]
    hertz = np.fft.rfftfreq(WINDOW, 1 / sample_rate)[:, None]
    return np.maximum(0, np.minimum((hertz - left) / (peak - left), (right - hertz) / (right - peak)))


def log_mel(samples, filters):
    """Log energies of the mel bands, of zero mean and unit variance in each, ``(steps, JOINED * FEATURES)``."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::STEP]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(WINDOW), axis=1)) ** 2
    steps = len(spectrum) // JOINED
    energies = np.log(spectrum[: steps * JOINED] @ filters + 1e-6)
    energies = (energies - energies.mean(axis=0)) / (energies.std(axis=0) + 1e-3)
    return energies.reshape(steps, -1).astype(np.float32)


def utterances(synthesiser, voices, count, seed, loudness=LOUDNESS):
    """Lists of features ``(T, F)`` and of digit strings."""
    rng, filters = np.random.default_rng(seed), mel_filters(synthesiser.sample_rate)
    features, strings = [], []
    for _ in range(count):
        digits = rng.integers(10, size=rng.integers(3, MOST + 1))
        samples = synthesiser.speak(
            " ".join(WORDS[digit] for digit in digits),
            rng.choice(ACCENTS),
            rng.choice(voices),
            int(rng.integers(130, 221)),
            int(rng.integers(30, 71)),
        )
        features.append(log_mel(add_noise(rng, samples, rng.uniform(*loudness)), filters))
        strings.append("".join(map(str, digits)))
    return features, strings


def with_labels(features, strings):
    """Pairs of features ``(T, F)`` and labels."""
    labels = (np.array([int(digit) + 1 for digit in string], np.int32) for string in strings)
    return [*zip(features, labels, strict=True)]


def recurrent(hidden):
    """Logits of the ten digits and the blank at every step."""
    return jrnn.stack(
        jrnn.bidirectional(jrnn.gru(hidden)),
        jrnn.dropout(0.2),
        jrnn.bidirectional(jrnn.gru(hidden)),
        jrnn.dropout(0.2),
        jrnn.dense(len(WORDS) + 1),
    )


def without_recurrence(hidden):
    layer = jrnn.stack(jrnn.dense(hidden), jrnn.activation("relu"), jrnn.dropout(0.2))
    return jrnn.stack(layer, layer, jrnn.dense(len(WORDS) + 1))


def train(model, examples, validation, seed, epochs, checkpoint=None):
    k_init, k_dropout, k_shuffle = jax.random.split(jax.random.key(seed), 3)
    drop_last = len(examples) > 10 * BATCH  # what does not fill a batch is left out of this epoch
    batches = ragged_batches(examples, BATCH, quantiles=PADDED, seed=k_shuffle, drop_last=drop_last)
    steps = epochs * len(batches)

    def loss(params, batch, key):
        (xs, lengths), (labels, counts) = batch
        _, logits = jrnn.unroll(model, params, xs, lengths=lengths, key=key)
        return jrnn.losses.ctc(logits, lengths, labels, counts, blank=BLANK)

    rate = schedule("warmup_cosine", 3e-3, steps=max(2, steps), warmup_steps=max(1, steps // 10))
    result = fit(
        make_step(loss, jrnn.optimizer("adam", rate, clip_norm=1.0)),
        model.init(k_init, JOINED * FEATURES),
        batches,
        key=k_dropout,
        epochs=epochs,
        validation=[*ragged_batches(validation, len(validation), quantiles=())(0)],  # one batch
        checkpoint=checkpoint,
    )
    return shared.finished(result, checkpoint)


def transcribe(model, params, features, length, width=None):
    """Digit strings, and the logits: greedily, or by a beam of so many prefixes; padded to ``length`` steps."""
    xs, lengths = jrnn.sequence.pad(features, length)
    _, logits = jax.jit(jrnn.unroll, static_argnums=0)(model, params, xs, lengths=lengths)
    if width is None:
        labels, counts = decoding.ctc_greedy(logits, lengths, blank=BLANK)
        found = [row[:count] for row, count in zip(np.asarray(labels).T, np.asarray(counts), strict=True)]
    else:
        found = [beams[0][0] for beams in decoding.ctc_beam(logits, lengths, width=width, blank=BLANK)]
    return ["".join(str(label - 1) for label in labels) for labels in found], logits


def errors(said, strings):
    """Digit error rate, and the share of strings with any error, in percent."""
    wrong = np.mean([a != b for a, b in zip(said, strings, strict=True)])
    return 100 * decoding.character_error_rate(said, strings), 100 * wrong


def plot(path, history, examples):
    """Validation, and test utterances: their spectrogram, and below it the probabilities of the digits."""
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=[1.1, 1, 1])
    curve = figure.add_subplot(grid[0, :])
    for name, losses in history.items():
        curve.plot(np.arange(1, len(losses) + 1), losses, marker=".", label=name)
    curve.set(yscale="log", ylabel="CTC loss, nats", title="Validation: other strings, the voices of training")
    shared.epoch_axis(curve, len(losses))
    curve.grid(alpha=0.3)
    curve.legend()
    for column, (xs, string, said, logits) in enumerate(examples):
        top, bottom = (figure.add_subplot(grid[row, column]) for row in (1, 2))
        top.imshow(xs.reshape(-1, FEATURES).T, origin="lower", aspect="auto", cmap="magma", extent=(0, len(xs), 0, 1))
        top.set(xticks=[], yticks=[], title=f"spoken {string}, read {said}")
        probabilities = np.asarray(jax.nn.softmax(logits[: len(xs)], -1))
        bottom.plot(probabilities[:, BLANK], color="0.7", linestyle=":", label="blank")
        for digit in range(10):
            bottom.plot(probabilities[:, digit + 1], color=f"C{digit}")
        best = probabilities.argmax(axis=1)
        for step in np.flatnonzero((best != BLANK) & (best != np.append(BLANK, best[:-1]))):
            bottom.text(step, 1.03, best[step] - 1, color=f"C{best[step] - 1}", ha="center")
        bottom.set(xlim=(0, len(xs)), ylim=(0, 1.15), xlabel="step of 23 ms", yticks=[0, 1])
    bottom.legend(loc="center right", fontsize=7, framealpha=0.6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "speech.png")
    parser.add_argument("--utterances", type=int, help="strings to train on (default: 2000; 5000 with --full)")
    parser.add_argument("--tests", type=int, default=300, help="strings of each test (default: %(default)s)")
    parser.add_argument("--hidden", type=int, help="units of each direction (default: 64; 128 with --full)")
    parser.add_argument("--epochs", type=int, help="passes over the strings (default: 12; 20 with --full)")
    parser.add_argument("--beam", type=int, default=8, help="prefixes that the beam keeps (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="more speech, a larger network, for longer")
    shared.add_checkpoint(parser)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    numbers = options.utterances, options.tests, options.hidden, options.epochs, options.beam
    if any(number is not None and number < 1 for number in numbers):
        parser.error("--utterances, --tests, --hidden, --epochs and --beam: expected 1 or more of each")
    count = options.utterances or (5000 if options.full else 2000)
    hidden = options.hidden or (128 if options.full else 64)
    epochs = options.epochs or (20 if options.full else 12)
    with shared.loading("speech.py", extra="examples,speech"):
        synthesiser = Synthesiser()
        print(f"eSpeak NG says {count} strings of digits in {len(VOICES)} voices", flush=True)
        features, strings = utterances(synthesiser, VOICES, count, [options.seed, 0])
        tests = {"training voices": utterances(synthesiser, VOICES, options.tests, [options.seed, 2])}
        for loudness in (20, 10, 0):
            test = utterances(synthesiser, TEST_VOICES, options.tests, [options.seed, 3], (loudness, loudness))
            tests[f"new voices, {loudness} dB"] = test
        held_out = utterances(synthesiser, VOICES, options.tests, [options.seed, 1])
    seconds = sum(map(len, features)) * JOINED * STEP / synthesiser.sample_rate
    print(f"{seconds / 60:.0f} minutes to train on; tests are in the same voices, and in {len(TEST_VOICES)} others\n")

    models = {"bidirectional GRU": recurrent(hidden), "no recurrence": without_recurrence(2 * hidden)}
    examples, validation = with_labels(features, strings), with_labels(*held_out)
    results = {}
    for name, model in models.items():
        print(f"{name}: {model}", flush=True)
        checkpoint = shared.checkpoint_of(options.checkpoint, name)
        results[name] = train(model, examples, validation, options.seed, epochs, checkpoint)

    print(f"\nwrong digits, and strings with a wrong digit, %, of {options.tests} strings in each test")
    print(f"{'':22}" + "".join(f"{name:>26}" for name in (*models, f"GRU, beam of {options.beam}")))
    longest = max(len(xs) for features, _ in tests.values() for xs in features)  # one shape, so compiled once
    for test, (xs, wanted) in tests.items():
        ways = [(name, None) for name in models] + [("bidirectional GRU", options.beam)]
        answers = [transcribe(models[name], results[name].params, xs, longest, width) for name, width in ways]
        rows = [errors(said, wanted) for said, _ in answers]
        print(f"{test:22}" + "".join(f"{digits:19.2f}{whole:7.1f}" for digits, whole in rows), flush=True)
        if test == "new voices, 10 dB":
            said, logits = answers[0]
            examples = [(xs[i], wanted[i], said[i], logits[:, i]) for i in range(min(3, len(xs)))]
    plot(options.out, {name: result.history["validation"]["loss"] for name, result in results.items()}, examples)
    print(f"picture: {options.out}")
    return rows[0][0]


if __name__ == "__main__":
    main()
