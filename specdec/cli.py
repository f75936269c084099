"""The command `specdec <experiment> key=value ...`: Hydra underneath, one line per error on top."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from specdec.config import CONFIGS, SCHEMAS, compose, groups, keys, options, register, to_typed

FLAGS = ("-m", "--multirun", "-c", "--cfg", "-p", "--package", "--resolve", "-h", "--help")
FLAGS_WITH_VALUE = ("-c", "--cfg", "-p", "--package")
# Keys whose value is a text as the shell hands it over; Hydra's quoting rules do not apply to them.
TEXT_KEYS: tuple[str, ...] = (
    "prompt",
    "prompt_file",
    "prompt_field",
    "path",
    "model",
    "base_model",
    "prompts",
    "template",
    "output",
    "work_dir",
    "draft",
    "folder",
    "cache",
)
TEXT_KEYS += tuple(f"{node}.{key}" for node in ("target", "drafter") for key in ("path", "gguf_file", "name"))
TEXT_KEYS += ("drafter.token_frequencies",)
TEXT_KEYS += tuple(
    f"source.{key}" for key in ("prompt_file", "prompt_field", "template", "path", "data_files", "files")
)
# How a word starts that gives a key its value; a path with an equals sign can be told apart by a leading ./
_KEY = r"[+~]*\w[\w./@-]*="
USER_ERRORS = (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException)


class _JobError(BaseException):
    """Carries an experiment's exception past Hydra, which would print it and go on."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, the experiment's own, 2 for an error, 130 for Ctrl-C.

    Errors of the user (values, files, misspelt keys) are one line on stderr; SPECDEC_DEBUG=1 shows their traceback.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _dispatch(words)
    except KeyboardInterrupt as stop:
        print(f"\nspecdec: interrupted{': ' if str(stop) else ''}{stop}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has left; nothing may be written while the interpreter shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except USER_ERRORS as error:
        if os.environ.get("SPECDEC_DEBUG") == "1":
            raise
        print(f"specdec: error: {explain(error, words)}", file=sys.stderr)
        return 2


def experiments() -> dict[str, str]:
    """Names of the experiments, files in experiments/ with a config of the same name, and one line about each.

    A file that would hide a module of the standard library when run as a script ends in an underscore: `inspect_.py`.
    """
    found = {}
    for entry in sorted(files("specdec.experiments").iterdir(), key=lambda entry: entry.name):
        stem, dot, suffix = entry.name.partition(".")
        name = stem.rstrip("_")
        if dot and suffix == "py" and (files(CONFIGS) / f"{name}.yaml").is_file():
            # Read and not imported: a list of names must not wait for torch.
            docstring = ast.get_docstring(ast.parse(entry.read_text(encoding="utf-8"))) or ""
            found[name] = docstring.partition("\n")[0]
    return found


def quote(text: str) -> str:
    """A text as a Hydra override value that means exactly this text."""
    # OmegaConf reads ${ as an interpolation, Hydra's quotes end at a quote; both are escaped by backslashes, which then
    # count themselves.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"


def quote_words(words: list[str]) -> list[str]:
    """Overrides with the values of text keys quoted, except those in Hydra's quotes already, `null` for any text but the
    prompt, and, with -m, sweeps."""
    is_multirun = bool({"-m", "--multirun"} & set(words))
    return [_quote_word(word, is_multirun) for word in words]


def _quote_word(word: str, is_multirun: bool) -> str:
    key, equals, value = word.partition("=")
    if not equals or key not in TEXT_KEYS or (value == "null" and key != "prompt"):
        return word
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{key}={value!a} is not valid UTF-8") from None
    if re.fullmatch(r"(?s)(['\"])(?:\\.|(?!\1)[^\\])*\1", value) or (is_multirun and _is_sweep(word)):
        return word
    return f"{key}={quote(value)}"


def _is_sweep(word: str) -> bool:
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        return False


def _dispatch(words: list[str]) -> int:
    known = experiments()
    if not words or words[0] in ("-h", "--help", "help"):
        _print_help(known)
        return 0
    name, *rest = words
    if name == "--version":
        print(f"specdec {importlib.import_module('specdec').__version__}")
        return 0
    if name not in known:
        raise ValueError(f"unknown experiment {name!r}{_meant(name, list(known))}; choose one of {', '.join(known)}")
    if {"-h", "--help"} & set(rest):
        _print_experiment_help(name, known[name])
        return 0
    # Hydra wants its flags together; a command line may have them anywhere.
    flags, overrides = list[str](), list[str]()
    remaining = iter(rest)
    for word in remaining:
        if not word.startswith("-"):
            overrides.append(word if re.match(_KEY, word) else _keyed(name, word, overrides))
            continue
        flags.append(word)
        if word.partition("=")[0] not in FLAGS:
            raise ValueError(f"unknown flag {word!r}; flags are {', '.join(FLAGS)}, everything else is key=value")
        flags += [next(remaining, "")] if word in FLAGS_WITH_VALUE else []
    return _run_with_hydra(name, quote_words([*flags, *overrides]), shlex.join(["specdec", *words]))


def _keyed(experiment: str, word: str, before: list[str]) -> str:
    """A word without a key as the value of the experiment's positional key, where it has one."""
    key = getattr(SCHEMAS.get(experiment), "positional", None)
    if key is None:
        return word
    if given := next((one for one in before if one.startswith(f"{key}=")), None):
        raise ValueError(f"{word!r}: {given} is given already, and everything else is key=value")
    return f"{key}={quote(word)}"


def _run_with_hydra(name: str, overrides: list[str], command: str) -> int:
    statuses: list[int] = []

    def job(config: DictConfig) -> None:
        try:
            typed = to_typed(config)
            is_file = (files("specdec.experiments") / f"{name}.py").is_file()
            experiment = importlib.import_module(f"specdec.experiments.{name if is_file else name + '_'}")
            statuses.append(experiment.run(typed, command) or 0)
        except Exception as error:
            raise _JobError from error

    register()
    app: Callable[[], Any] = hydra.main(config_path=f"pkg://{CONFIGS}", config_name=name, version_base="1.3")(job)
    try:
        with _hydra_surroundings([name, *overrides]):
            app()
    except _JobError as carrier:
        assert carrier.__cause__ is not None
        raise carrier.__cause__ from None
    except SystemExit as stop:
        # --cfg leaves this way.
        return stop.code if isinstance(stop.code, int) else 0
    return max(statuses, default=0)


@contextmanager
def _hydra_surroundings(argv: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and without HYDRA_FULL_ERROR it prints errors by itself and exits."""
    saved_argv, saved = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = argv
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        del os.environ["HYDRA_FULL_ERROR"]
        if saved is not None:
            os.environ["HYDRA_FULL_ERROR"] = saved


def _print_help(known: dict[str, str]) -> None:
    print("usage: specdec <experiment> [PATH] key=value ...\n\nexperiments:")
    for name, line in known.items():
        print(f"  {name:<12}{line}")
    print("\n`specdec <experiment> --help` lists its options; -m runs every combination of comma-separated values.")


def _print_experiment_help(name: str, line: str) -> None:
    example = (files(CONFIGS) / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    config = compose(name, [])
    print(f"{line}\n\n  {example}\n")
    if used := [group for group in groups() if group.partition("/")[0] in config]:
        print("Choose with group=option:\n")
        for group in used:
            print(f"  {group:<16}{', '.join(options(group))}")
        print()
    print(f"Set with key=value (defaults):\n\n{OmegaConf.to_yaml(config)}")


def explain(error: BaseException, words: list[str]) -> str:
    """What went wrong in one line, with what would be valid."""
    message, cause = str(error), error.__cause__
    if isinstance(error, OverrideParseException):
        text = f"cannot read {error.override!r}: write key=value, and quote a value that holds any of ,()[]{{}}:="
    elif isinstance(error, MissingConfigException) and (found := re.search(r"Could not find '(.*)/(.*)'", message)):
        group, option = found.groups()
        choices = options(group)
        text = f"{group}={option} is unknown{_meant(option, choices)}; choose one of {', '.join(choices)}"
    elif found := re.search(r"^Could not override '(.*?)'", message):
        inside = re.match(r"Key '(\w+)' not in", str(cause))
        if inside and inside[1] not in re.split("[./]", found[1]):
            # The key itself is fine: what is given to it holds another one.
            text = f"{found[1]} holds an unknown key {inside[1]!r}"
        else:
            text = _unknown_key(found[1], words)
    elif isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        override = message.removeprefix("Error merging override ")
        text = f"{override}: {str(cause).partition(chr(10))[0]}"
    elif message.startswith("Ambiguous value"):
        text = f"{message.partition(chr(10))[0].split(maxsplit=4)[-1]} lists several values: add -m to run each of them"
    elif (isinstance(error, MissingMandatoryValue) and (found := re.search(r"full_key: (\S+)", message))) or (
        found := re.search(r"Missing mandatory value: (\S+)", message)
    ):
        text = f"{found[1]} is missing: give {found[1]}=VALUE"
    elif message.startswith("Config group override must be"):
        word = next((word for word in words if options(word.partition("=")[0])), "")
        group = word.partition("=")[0]
        text = f"{word} is unknown; choose one of {', '.join(options(group))}"
    elif isinstance(error, OmegaConfBaseException) and (found := re.search(r"full_key: (\S+)", message)):
        text = f"{found[1]}: {message.partition(chr(10))[0]}"
    elif isinstance(error, FileNotFoundError) and error.filename is not None:
        text = f"no such file or folder: {error.filename}"
    else:
        text = message or type(error).__name__
    return " ".join(text.split())


def _unknown_key(key: str, words: list[str]) -> str:
    if options(key) and key.partition("/")[0] not in compose(words[0], []):
        used = [group for group in groups() if group.partition("/")[0] in compose(words[0], [])]
        return f"{words[0]} has no {key} to choose; it has {', '.join(used)}"
    if options(key):
        return f"{key} cannot be chosen here: another choice (drafter=none?) leaves no room for it"
    choices = [w for w in words[1:] if (found := re.match(r"([\w/]+)=(\w+)$", w)) and found[2] in options(found[1])]
    known = [*keys(compose(words[0], choices)), *groups()]
    if choices and key in keys(compose(words[0], [])):
        return f"there is no {key} with {' '.join(choices)}"
    last = re.split("[./]", key)[-1]
    near = [one for one in known if re.split("[./]", one)[-1] == last]
    near += [one for one in difflib.get_close_matches(key, known, n=3, cutoff=0.75) if one not in near]
    near = near or [one for one in known if difflib.get_close_matches(last, re.split("[./]", one)[-1:], cutoff=0.7)]
    if near:
        return f"unknown key {key!r}; did you mean {' or '.join(near[:3])}?"
    top = dict.fromkeys(one.partition(".")[0] for one in known if "/" not in one)
    return f"unknown key {key!r}; known are {', '.join(top)}"


def _meant(word: str, options: list[str]) -> str:
    near = difflib.get_close_matches(word, options, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


if __name__ == "__main__":
    sys.exit(main())
