"""The command ``keyveil``: training is LightningCLI's four verbs; the rest is one function a verb."""

from __future__ import annotations

import itertools
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

# What Lightning says of every run of this kind: frozen networks stay in eval mode, steps are taken by hand.
_NOISE = (
    "(?s).*(num_workers|LeafSpec|in eval mode at the start|pre-optimization state|log_every_n_steps"
    "|exists and is not empty|dataloader is not resumable)"
)

_RESUME = "auto: go on from the newest checkpoint of the run's folder that can be read, if there is one"

SWITCHES = ("--dry_run", "--fresh", "--offline", "--keep_metadata", "--lossless", "--private", "--profile")
TRAINING = ("fit", "validate", "test", "predict")
# Verbs of research, whose files may name classes of modules in the current folder; not those that open other people's
# pictures, which may lie beside anything.
RESEARCH = (*TRAINING, "sweep", "compare", "attack", "export", "grid", "edit", "limits", "judges")


def fit() -> None:
    """Train a method: --config METHOD.yaml --config DATA.yaml --config TRAINER.yaml (see `keyveil fit --help`)."""


def validate() -> None:
    """Measure a checkpoint on the validation people: as fit, with --ckpt_path FILE."""


def test() -> None:
    """Measure a checkpoint on the test people: as fit, with --ckpt_path FILE."""


def predict() -> None:
    """Anonymize the test people into PNG files with a checkpoint, under public keys: as fit, with --ckpt_path FILE."""


def train(arguments: Sequence[str]) -> None:
    """Run LightningCLI: a method, a data set and a trainer, each from a YAML file and the command line."""
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from lightning_modules.anonymizer import ReversibleAnonymizer
    from lightning_modules.callbacks import EMA, FaceWriter, Faster, RoundTripGrid, RoundTripMetrics, TrainingCheckpoint
    from lightning_modules.callbacks.training_checkpoint import newest_checkpoint
    from lightning_modules.trained import load_trained

    class KeyveilCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            """Checkpoints, metrics and grids belong to every run; each is a key of its own in the files."""
            parser.add_lightning_class_args(TrainingCheckpoint, "checkpoint")
            parser.add_lightning_class_args(RoundTripMetrics, "metrics")
            parser.add_lightning_class_args(RoundTripGrid, "grid")
            parser.add_lightning_class_args(FaceWriter, "faces")
            parser.add_lightning_class_args(EMA, "ema")
            parser.add_lightning_class_args(Faster, "faster")
            parser.add_argument("--resume", type=Literal["auto", "no"], default="no", help=_RESUME)

        def before_instantiate_classes(self) -> None:
            """Let W&B keep what is logged where it cannot be reached."""
            loggers = self.config[self.subcommand]["trainer"].get("logger")
            for one in loggers if isinstance(loggers, list) else [loggers]:
                given = getattr(one, "init_args", None) or {}
                if getattr(one, "class_path", "").endswith("WandbLogger") and not given.get("offline"):
                    _offline_where_unreachable()

        def _parse_ckpt_path(self) -> None:
            """Nothing: our checkpoints hold no arguments, and damaged ones are told by :meth:`_check`."""

        def before_fit(self) -> None:
            """Find the checkpoint to go on from, and see that it can be read."""
            told = self.config_init["fit"]
            if told["resume"] == "auto" and not told.get("ckpt_path"):
                folder = Path(self.trainer.default_root_dir) / "checkpoints"
                told["ckpt_path"] = newest_checkpoint(told["checkpoint"].dirpath or folder)
                print(f"going on from {told['ckpt_path'] or 'the beginning'}", file=sys.stderr)
            self._check("fit")

        def before_validate(self) -> None:
            """See that the checkpoint can be read."""
            self._check("validate")

        def before_test(self) -> None:
            """See that the checkpoint can be read."""
            self._check("test")

        def before_predict(self) -> None:
            """See that the checkpoint can be read."""
            self._check("predict")

        def _check(self, verb: str) -> None:
            path = self.config_init[verb].get("ckpt_path")
            if path and str(path) not in ("last", "best", "hpc", "registry"):
                load_trained(self.model, path)

    # Plain "omegaconf" resolves ${…} inside one file only; with "+" method, data and trainer files see each other.
    parser = {"parser_mode": "omegaconf+", "exit_on_error": False}
    try:
        KeyveilCLI(
            ReversibleAnonymizer,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"inference_mode": False},  # refinement takes gradients while it measures
            parser_kwargs={**parser, **dict.fromkeys(TRAINING, parser)},
            save_config_kwargs={"overwrite": True},
            args=None if arguments == sys.argv[1:] else list(arguments),
        )
    except SIGTERMException as stop:  # Lightning's leaves with code 0, as if all had been trained
        print("stopped; go on with --resume auto", file=sys.stderr)
        raise SystemExit(143) from stop


def _offline_where_unreachable() -> None:
    """Without W&B's server a run would wait for it and then fail; offline it trains, and is sent later."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if os.environ.get("WANDB_MODE") or getproxies():
        return  # chosen, or not to be told from here
    import wandb

    server = urlsplit(wandb.setup().settings.base_url)  # the environment's, or that of `wandb login --host`
    wandb.teardown()  # or it would not look at the environment again
    if server.hostname is None:
        return
    try:
        socket.create_connection((server.hostname, server.port or {"http": 80}.get(server.scheme, 443)), 5).close()
    except OSError as error:
        os.environ["WANDB_MODE"] = "offline"
        address = f"{server.scheme}://{server.netloc.rpartition('@')[2]}"
        print(f"{address} cannot be reached ({error}): logging offline; `wandb sync` sends it later", file=sys.stderr)


def verbs() -> dict[str, Any]:
    """Every verb: its function, or a group of them."""
    from experiments import (
        attack,
        benchmark,
        compare,
        convert,
        curves,
        data,
        edits,
        export,
        generator,
        grids,
        hub,
        judges,
        limits,
        photo_trips,
        photos,
        recipe,
        rekey,
        serve,
        sweep,
        weights,
    )

    return {
        "fit": fit,
        "validate": validate,
        "test": test,
        "predict": predict,
        "anonymize": photos.anonymize,
        "recover": photos.recover,
        "inspect": photos.inspect,
        "verify": photos.verify,
        "rekey": rekey.rekey,
        "serve": serve.serve,
        "recipe": recipe.recipe,
        "sweep": sweep.sweep,
        "compare": compare.compare,
        "attack": attack.attack,
        "export": export.export,
        "grid": grids.grid,
        "edit": edits.edit,
        "limits": limits.limits,
        "curves": curves.curves,
        "benchmark": benchmark.benchmark,
        "weights": {
            "_help": "Frozen networks by card, and our own trained weights.",
            "list": weights.list_cards,
            "fetch": weights.fetch,
            "verify": weights.verify,
            "path": weights.path,
            "convert": convert.convert,
            "export": weights_export,
            "push": hub.push,
            "pull": hub.pull,
        },
        "judges": {
            "_help": "The recognisers that only measure.",
            "verify": judges.lfw_view2,
            "calibrate": judges.calibrate_all,
            "photos": photo_trips.photos,
        },
        "data": {
            "_help": "Faces and their labels.",
            "label": data.label,
            "overlap": data.overlap,
            "shard": data.shard,
        },
        "generator": {
            "_help": "The frozen generator and its preview head.",
            "sample": generator.sample,
            "fit-preview": generator.fit_preview,
            "measure-preview": generator.measure_preview,
        },
    }


def weights_export(checkpoint: str, out: str, note: str = "") -> None:
    """Turn a training checkpoint into a small safetensors file (fp16, trained parts only).

    Args:
        checkpoint: A .ckpt of `keyveil fit`.
        out: The .safetensors file to write.
        note: How it was made: config, data, hardware.
    """
    from pathlib import Path

    from lightning_modules.trained import export

    export(Path(checkpoint), Path(out), note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; a caller's mistake ends in one sentence on standard error and exit code 1.

    ``KEYVEIL_DEBUG=1`` shows the traceback instead.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_NOISE)
            return _run(arguments)
    except KeyboardInterrupt:
        print("stopped; what was finished is kept", file=sys.stderr)
        return 130
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, of a training within another verb; it has no code
            print("stopped; what was finished is kept", file=sys.stderr)
            return 143
        raise
    except Exception as error:
        if os.environ.get("KEYVEIL_DEBUG") or not _told(error):
            raise
        from experiments.build import one_sentence

        print(f"error: {one_sentence(error)}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in RESEARCH and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there; at the end, so that it hides nothing
    if arguments and arguments[0] in TRAINING:
        train(arguments)
        return 0
    if arguments[:1] == ["--version"]:
        from importlib.metadata import version

        print(f"keyveil {version('keyveil')}")
        return 0
    if arguments[:1] == ["weights"] and arguments[1:2] in (
        ["fetch"],
        ["verify"],
    ):  # names may follow as plain words
        options = [word for word in arguments[2:] if word.startswith("-")]
        names = [word for word in arguments[2:] if not word.startswith("-")]
        arguments = [*arguments[:2], *options, *([f"--names=[{','.join(names)}]"] if names else [])]
    if arguments[:1] in (["anonymize"], ["recover"], ["rekey"], ["curves"]):
        option = "runs" if arguments[0] == "curves" else "paths"
        arguments = [arguments[0], *_gather_paths(arguments[1:], option)]
    from jsonargparse import auto_cli

    arguments = [*itertools.starmap(_switch, itertools.pairwise([*arguments, ""]))]
    code = auto_cli(
        verbs(),
        args=arguments or ["--help"],
        prog="keyveil",
        description="Reversible, keyed face anonymization: train, compare, and use on photos.",
        exit_on_error=False,
    )
    return code if isinstance(code, int) else 0


def _gather_paths(words: list[str], option: str) -> list[str]:
    """``A B --out DIR``: words that belong to no option are paths; ``-`` and ``_`` in an option's name are one.

    Raises:
        ValueError: A secret stands on the command line, where every process of the machine can read it.
    """
    options, paths = [], []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "--":
            paths += words
            break
        if not word.startswith("-"):
            paths.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name[:2] + name[2:].replace("-", "_")
        if name in ("--secret", "--password", "--passphrase", "--key"):
            raise ValueError(
                "a secret is never given on the command line: use --secret_file, KEYVEIL_SECRET, or the prompt"
            )
        options.append(name + equals + value)
        if not equals and name not in (*SWITCHES, "--help", "-h") and words:
            options.append(words.pop(0))
    # JSON, so that no name is taken apart or for anything but text
    return [*options, *([f"--{option}={json.dumps(paths, ensure_ascii=False)}"] if paths else [])]


def _switch(word: str, following: str) -> str:
    """``--dry_run`` and its like are switched on where neither ``true`` nor ``false`` follows."""
    return f"{word}=true" if word in SWITCHES and following.lower() not in ("true", "false") else word


def _told(error: Exception) -> bool:
    """Whether this is a caller's mistake or a missing thing, told in its own sentence, rather than our bug."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_modules.weights import WeightsError

    kinds: tuple[type[Exception], ...] = (
        ValueError,
        OSError,
        WeightsError,
        ArgumentError,
        MisconfigurationException,
    )
    # a worker was killed, mostly for want of memory, or another process of the run
    lost = isinstance(error, RuntimeError) and any(word in str(error) for word in ("DataLoader worker", "by peer"))
    return isinstance(error, kinds) or lost or type(error).__module__.startswith("wandb")


if __name__ == "__main__":
    sys.exit(main())
