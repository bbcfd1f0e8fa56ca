"""What the examples share: their options, the reading of a user's CSV file, and pictures that stay readable."""

import argparse
import codecs
import contextlib
import csv
import importlib.metadata
import io
import os
import pathlib
import sys
import unicodedata

import numpy as np
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MOST_CLASSES = 30  # rows and columns of a confusion matrix: more would be too small to read
LABEL_WIDTH = 24  # columns of text that a label in a picture may take


def parser(description, picture):
    """A parser of options with ``--out``, which every example has; ``picture`` is the default file."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--out", type=picture_path, default=picture, help="where to draw the picture (default: %(default)s)"
    )
    return found


def add_checkpoint(parser):
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="save the training in this folder as it goes, and go on from there in the next run of the same command",
    )


def checkpoint_of(directory, name):
    """Where one of several trainings is saved, in the folder of ``--checkpoint``; None where that was not given."""
    return directory and os.path.join(directory, name.replace(" ", "_"))


def finished(result, checkpoint=None):
    """The result of one of several trainings; ends the program where ^C cut it off.

    A table must not show it beside complete trainings, and after ^C no further training should start.
    """
    if result.stopped == "interrupt":
        goes_on = "; the same command goes on from there" if checkpoint else ""
        sys.exit(f"interrupted at step {int(result.state.step)}: an incomplete training has no results{goes_on}")
    return result


def noted(result):
    """The result of the only training of a program; says so where ^C cut it off."""
    if result.stopped == "interrupt":
        print(f"\ninterrupted at step {int(result.state.step)}: the results below are of an incomplete training")
    return result


def confusion(truth, said, classes):
    """Counts ``(classes, classes)`` of ids, the truth down and the answers across."""
    pairs = classes * np.asarray(truth, int).ravel() + np.asarray(said, int).ravel()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def picture_path(text):
    """The path of a picture that can be drawn: it is better to know before the training than after it."""
    if pathlib.Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a file to draw to, and {text} is a folder")
    path = pathlib.Path(text if pathlib.Path(text).suffix else f"{text}.png")
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder to write {text} to")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"no permission to write {path}")
    trial = Figure(figsize=(1, 1))
    trial.text(0, 0, "text")
    try:  # some formats need a program or a package that may not be installed, so draw something
        trial.savefig(io.BytesIO(), format=path.suffix[1:])
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot draw to {text}: {error}") from None
    return path


def positive(text):
    """An option that counts something: 0 is refused, and not taken for an option that was not given."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


def add_csv_options(parser, help):
    parser.add_argument("--csv", help=help)
    parser.add_argument(
        "--encoding", type=_encoding, default="utf-8-sig", help="how the CSV file stores text (default: UTF-8)"
    )
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out the rows of the CSV file that cannot be used"
    )


def add_file(parser, option, help):
    parser.add_argument(option, metavar="FILE", help=help)
    parser.add_argument(
        "--encoding", type=_encoding, default="utf-8-sig", help="how that file stores text (default: UTF-8)"
    )


def _encoding(name):
    try:
        "a".encode(name)
    except LookupError as error:
        raise argparse.ArgumentTypeError(f"{error}; expected, for example, latin-1 or utf-16") from None
    return name


@contextlib.contextmanager
def loading(script, remedy="", extra="examples"):
    """Ends the program with one line, and no traceback, where the data cannot be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"{script}: {error}")
    except ImportError as error:
        sys.exit(f'{script}: {error}; pip install -e ".[{extra}]" brings it{remedy}')


def package_file(package, path, command=None):
    """The path of a file that ships with an installed package, which is not imported.

    ``command`` installs the package where the extra ``examples`` does not bring it.
    """
    try:
        found = pathlib.Path(importlib.metadata.distribution(package).locate_file(path))
    except importlib.metadata.PackageNotFoundError:
        if command is None:
            raise ImportError(f"the data ship with the package {package}, which is not installed") from None
        raise ValueError(f"the data ship with the package {package}; {command} brings it") from None
    if not found.is_file():
        raise ValueError(f"the installed version of {package} has no {path}; another version may")
    return found


def csv_header(path, encoding="utf-8-sig"):
    """The names in the header of a CSV file, stripped and in lower case."""
    rows = csv.reader(io.StringIO(read_text(path, encoding), newline=""))
    try:
        header = [name.strip().lower() for name in next(rows, [])]
    except csv.Error as error:
        raise ValueError(f"{path}, line 1: {error}; is a quote missing in the header?") from None
    if not any(header):
        raise ValueError(f"{path} is empty; expected a header with the names of its columns")
    return header


def read_csv(path, columns, parse, encoding="utf-8-sig", skip_bad_rows=False):
    """A list of ``parse(cells)`` for each row of a CSV file with a header; ``cells`` is a dict of stripped strings.

    ``columns`` are the names that the header must have, in any order and case. A row is bad where ``parse`` raises a
    ValueError. Bad rows are an error that names the first of them, or are left out and counted in one printed line.
    """
    text = read_text(path, encoding)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    first_line = 1
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        if not any(header):
            raise ValueError(f"{path} is empty; expected a header with the columns {', '.join(columns)}")
        missing = [name for name in columns if name not in header]
        if missing:
            raise ValueError(
                f"{path}: missing column(s) {', '.join(missing)}; its header has {', '.join(header)} "
                "(a comma between columns is expected)"
            )
        twice = [name for name in columns if header.count(name) > 1]
        if twice:
            raise ValueError(f"{path}: its header has the column {twice[0]} more than once")
        parsed, bad = [], []
        first_line = rows.line_num + 1
        for row in rows:
            if any(map(str.strip, row)):  # a row of nothing but commas is an empty line
                try:
                    parsed.append(parse(_cells(header, row)))
                except ValueError as error:
                    bad.append(f"line {first_line}, {error}")
            first_line = rows.line_num + 1
    except csv.Error as error:  # what follows a misplaced quote cannot be told apart, so this is no row to skip
        raise ValueError(
            f"{path}, line {first_line}: {error}; is a quote missing in the row that begins here?"
        ) from None
    if bad and not skip_bad_rows:
        more = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
        raise ValueError(f"{path}, {bad[0]}{more}; --skip-bad-rows leaves out what cannot be used")
    if bad:
        print(f"{path}: left out {len(bad)} of {len(bad) + len(parsed)} rows, the first of them {bad[0]}")
    return parsed


def _cells(header, row):
    if any(map(str.strip, row[len(header) :])):
        raise ValueError(
            f"expected {len(header)} cells, as the header has, got {len(row)}; a cell with a comma in it needs quotes"
        )
    return dict.fromkeys(header, "") | {name: cell.strip() for name, cell in zip(header, row, strict=False)}


def read_text(path, encoding):
    """The text of a file; a ValueError that says what to do where it is not in this encoding."""
    data = pathlib.Path(path).read_bytes()
    try:
        text = data.decode(encoding)
    except UnicodeError as error:
        problem = str(error)
    else:
        if "\0" not in text:
            return text
        problem = "null characters"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        advice = "--encoding utf-16 reads it"
    elif b"\0" in data:
        advice = "is it UTF-16? Try --encoding utf-16-le or utf-16-be"
    else:
        advice = "say how it stores text, for example --encoding latin-1"
    raise ValueError(f"{path}: expected text in {encoding.removesuffix('-sig')}, got {problem}; {advice}")


def epoch_axis(axes, epochs):
    """Whole epochs along the horizontal axis, be it one or hundreds."""
    axes.set(xlabel="epoch", xlim=(0.5, epochs + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_accuracy(axes, accuracy, margin=5):
    """The accuracy on validation after each epoch, in percent, from so much below the least of it up to 100."""
    axes.plot(np.arange(1, len(accuracy) + 1), accuracy, marker="o", clip_on=False)
    axes.set(ylabel="accuracy on validation, %", title="Training", ylim=(max(0, accuracy.min() - margin), 100))
    axes.set_box_aspect(0.9)  # however tall the matrix beside it is
    axes.set_anchor("N")
    epoch_axis(axes, len(accuracy))
    axes.grid(alpha=0.3)


def matrix_size(classes):
    """Inches of a side of the confusion matrix, so that its numbers do not touch."""
    return max(4.0, 0.4 * min(classes, MOST_CLASSES))


def draw_confusion(axes, counts, labels):
    """A confusion matrix ``(classes, classes)``, the truth down and the answers across.

    Of many classes, the rarest are drawn as one. Labels that do not fit below their columns stand only beside the
    rows, with the numbers of the columns. A label that cannot be drawn whole is printed.
    """
    counts, labels = _fold(np.asarray(counts), labels)
    names, families = drawable(labels)
    # The root shows single mistakes beside dozens of hits. What was added up to one class does not set the scale.
    darkest = np.sqrt(counts[: MOST_CLASSES - 1, : MOST_CLASSES - 1].max(initial=1))
    axes.imshow(np.sqrt(counts), cmap="Blues", vmin=0, vmax=darkest)
    small = dict(fontsize=9 if len(names) < 20 else 7)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            dark = np.sqrt(count) > darkest / 2
            color = "white" if dark else "black" if row == column else "tab:red"
            axes.text(column, row, f"{count:.1f}".removesuffix(".0"), ha="center", va="center", color=color, **small)
    ticks, numbers = np.arange(len(names)), [str(i) for i in range(1, len(names) + 1)]
    if names != labels or len(names) * max(map(_width, names)) > 40:  # what fits into one line below the matrix
        rows, columns = [f"{name} ({number})" for name, number in zip(names, numbers, strict=True)], numbers
    else:
        rows = columns = names
    style = dict(parse_math=False, family=families)  # a dollar sign in a label is no mathematics
    axes.set_xticks(ticks, columns, **style, **small)
    axes.set_yticks(ticks, rows, **style, **small)
    for name, number, label in zip(names, numbers, labels, strict=True):
        if name != label:
            print(f"in the picture, class {number} is {label}")


def _fold(counts, labels):
    """The counts and labels with the rarest classes added up to one, where there are more than ``MOST_CLASSES``."""
    labels = [" ".join(str(label).split()) for label in labels]
    if len(labels) <= MOST_CLASSES:
        return counts, labels
    common = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[: MOST_CLASSES - 1])
    place = np.full(len(labels), MOST_CLASSES - 1)
    place[common] = np.arange(len(common))
    folded = np.zeros((MOST_CLASSES, MOST_CLASSES), counts.dtype)
    np.add.at(folded, (place[:, None], place), counts)
    return folded, [*(labels[i] for i in common), f"{len(labels) - len(common)} others"]


def drawable(labels):
    """``(names, families)``: of each label what can be drawn, and the fonts that have its characters.

    Characters that no font on this machine has are left out, and what is too long is cut off.
    """
    families, known = _fonts(set("".join(labels)))
    return [_shorten("".join(filter(known.__contains__, label))) for label in labels], families


def _width(text):
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _shorten(text):
    if _width(text) <= LABEL_WIDTH:
        return text
    while _width(text) > LABEL_WIDTH - 1:
        text = text[:-1]
    return text + "…"


def _fonts(wanted):
    """``(families, known)``: the usual font and those needed for the wanted characters, which it may not have."""
    usual = font_manager.get_font(font_manager.findfont("DejaVu Sans"))  # it comes with Matplotlib
    known, families = set(map(chr, usual.get_charmap())), [*rcParams["font.family"]]
    missing = {character for character in wanted - known if character.isprintable()}
    if not missing:
        return families, known
    offers = {}
    for entry in font_manager.fontManager.ttflist:
        # The font of last resort has a placeholder for every character.
        if entry.style == "normal" and not entry.name.startswith(("Last Resort", ".")) and entry.name not in offers:
            with contextlib.suppress(OSError, RuntimeError):
                offers[entry.name] = missing & set(map(chr, font_manager.get_font(entry.fname).get_charmap()))
    while missing and offers:
        name = max(sorted(offers), key=lambda name: len(offers[name] & missing))
        if not (found := offers.pop(name) & missing):
            break
        families.append(name)
        missing -= found
        known |= found
    return families, known
