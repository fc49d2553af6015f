"""Fuzzed configurations, in files and on the command line: settings, or a sentence that names the file or key."""

import random
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torture.campaign import Campaign, Case, Failed, named
from torture.injuries import injure
from torture.watching import SECRET, nothing_done, watch

_TYPED = (ValueError, OSError)


def _values(canary: Path, secret: Path) -> tuple[str, ...]:
    touch = f"touch {canary}"
    return (
        *(f"${{oc.env:{SECRET}}}", f"${{env:{SECRET}}}", f"${{oc.env:{SECRET},default}}", f"$'{SECRET}'", f"${SECRET}"),
        *("${run}", "${..run}", "${oc.select:train.seed}", "${oc.decode:1}", "${oc.dict.keys:train}", "${", "${}", "}"),
        *(f"!!python/object/apply:os.system ['{touch}']", f"!!python/object/new:os.system ['{touch}']"),
        *("!!python/name:os.system ''", "!!python/module:os", f"!include {secret}", f"!ENV {SECRET}", "!!binary AAAA"),
        *(f"__import__('os').system('{touch}')", f"$({touch})", f"`{touch}`", f"; {touch}", f"file://{secret}"),
        *("{{ ''.__class__ }}", "{% raw %}", "%s%s%n", "???", "&a [*a, *a]", "*a", "<<: *a", "? [a]: b"),
        *("null", "~", "[]", "{}", "[1, 2", "{a: {b: {c: 1}}}", "'", '"', "|\n  text", "--- a", "2020-01-01", "1:30"),
        *("1e999", "-1e999", ".nan", ".inf", "-1", "0", "0x7f", "0o17", "1_000", "9" * 400, "1" + "0" * 5000, "yes"),
        *("true", "", " ", "\t", "a" * 100_000, "[" * 2000, "{a: " * 500, "\u0000", "\ud7ff", "\ufeff", "\u202e", "é"),
        *("../" * 30 + "etc/passwd", "/dev/zero", "/dev/stdin", "con", "hf://x/../y", "os.system", "torch.load"),
    )


def fuzzed(case: Case) -> str:
    """Read one fuzzed configuration."""
    canary, secret = case.folder / "canary", case.folder / "secret"
    watch(secret)
    values = _values(canary, secret)
    if case.random.random() < 0.4:
        kind, shown = _command_line(case, values)
    else:
        kind, shown = _file(case, values)
    nothing_done(canary, shown)
    return kind


def _command_line(case: Case, values: tuple[str, ...]) -> tuple[str, str]:
    from recipes.sisma.train import parse

    draw = case.random
    words = [f"{_key(draw)}{draw.choice(('=', '=', '=', '=', '', ':', '+='))}{draw.choice(values)}" for _ in range(3)]
    words = words[: draw.randint(1, 3)]
    if draw.random() < 0.3:
        words.insert(0, draw.choice(("quick", "paper", "faces", "nothing", draw.choice(values))))
    try:
        return "command line, accepted", _text(parse(words))
    except _TYPED as error:
        return "command line, refused", _sentence(error, *[word.partition("=")[0] for word in words])
    except Exception as error:
        raise Failed(f"{words!r}: {type(error).__name__}: {error}") from error


def _file(case: Case, values: tuple[str, ...]) -> tuple[str, str]:
    from recipes.sisma.presets import Config, quick
    from recipes.sisma.runs import load_config, save_config

    draw, file = case.random, case.folder / "config.yaml"
    save_config(quick(), file)
    if draw.random() < 0.3:
        donor = case.folder / "donor"
        donor.write_text(draw.choice(values) * 3)
        injure(file, draw, donor)
    else:
        lines = file.read_text().splitlines()
        for _ in range(draw.randint(1, 3)):
            position = draw.randrange(len(lines))
            indent = lines[position][: len(lines[position]) - len(lines[position].lstrip())]
            line = f"{indent}{_key(draw).rpartition('.')[2]}: {draw.choice(values)}"
            if draw.random() < 0.3:
                line = draw.choice(values)
            lines[position : position + draw.choice((0, 1))] = [line]
        file.write_text("\n".join(lines), errors="surrogatepass")
    try:
        found = load_config(case.folder)
    except _TYPED as error:
        return "file, refused", _sentence(error, "config.yaml")
    except Exception as error:
        raise Failed(f"{type(error).__name__}: {error}") from error
    if not isinstance(found, Config):
        raise Failed(f"reads as {found!r}")
    return "file, accepted", _text(found)


def _key(draw: random.Random) -> str:
    keys = (
        "run",
        "train.lr",
        "lr",
        "steps",
        "model_args.dim",
        "model_args",
        "sampling.solver",
        "seed",
        "data",
        "nothing",
    )
    return draw.choice((*keys, "train", "__class__", "model_args.__init__", "a.b.c", "short_names", "", "preset"))


def _sentence(error: Exception, *names: str) -> str:
    text = str(error)
    if not text.strip():
        raise Failed(f"{type(error).__name__} without a message")
    if all(names):  # an empty key has no name
        named(text, *[part for name in names for part in (name, repr(name)[1:-1], name.rpartition(".")[2])])
    return text.replace("${oc.env", "")


def _text(settings: Any) -> str:
    """All values of the settings, as text."""
    if is_dataclass(settings):
        return " ".join(_text(getattr(settings, each.name)) for each in fields(settings))
    return str(settings)


CAMPAIGN = Campaign(
    "configurations",
    "A fuzzed configuration, in a file or on the command line, gives settings or a sentence that names the file or "
    "key; nothing is executed, no environment is read, no socket opened",
    fuzzed,
    5000,
    limit=20,
)
