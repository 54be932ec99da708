"""``keyveil serve``: a local web page that anonymizes and recovers pictures."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from datamodules.photo_search import SIDECAR, Found, find_photos
from experiments.anonymizing import Hiding
from experiments.photo_methods import METHODS, Running, load_photo_method, method_of
from experiments.photos import anonymize_files, check_options, needs_secret, recover_files
from lightning_modules import manifest as manifests
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.keys import Secret
from lightning_modules.trained import weights_hash

Pairs = list[tuple[str, str]]
Advance = Callable[[float], None]

ABOUT = """
# keyveil
Faces give way to other people's; with the secret they come back. Everything happens on this computer, and what was
dropped here is removed when keyveil stops.
"""


def serve(
    host: str = "127.0.0.1", port: int = 7860, refine: int | None = None, accelerator: str = "auto", open: bool = True
) -> None:
    """Open a local web page: drop pictures, type a secret, look, download, recover. Stop it by Ctrl-C.

    Needs gradio: `pip install 'keyveil[web]'`. Pictures and secrets are not written anywhere but in a folder of this
    run, which only you can read and which is removed at the end; secrets are not written at all.

    Args:
        host: Where it listens. Others than 127.0.0.1 can be reached by everybody, and secrets would travel in clear.
        port: The port.
        refine: Steps of optimisation a face, for ifadit.
        accelerator: Lightning's.
        open: Open the page in a browser.

    Raises:
        ValueError: gradio is not installed.
        OSError: The port is taken.
    """
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"everybody who reaches {host} can use this page, and secrets travel in clear", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="keyveil-") as folder:
        page = build(Desk(Path(folder), refine, accelerator))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes
        launch(page, server_name=host, server_port=port, inbrowser=open)
        print(f"keyveil listens at http://{host}:{port}; Ctrl-C stops it", file=sys.stderr)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)


def launch(page: Any, **where: Any) -> str:
    """Start listening, and nothing beyond this computer: no tunnel, no history of runs in the browser.

    Args:
        page: What :func:`build` made.
        **where: As of ``gradio.Blocks.launch``.

    Returns:
        The address.
    """
    quiet = {"quiet": True, "show_error": True, "footer_links": []}
    _, address, _ = page.launch(share=False, run_history=False, prevent_thread_lock=True, **quiet, **where)
    return address


@dataclass
class Desk:
    """What the page does, without the page.

    Attributes:
        folder: Where pictures lie while it runs.
        refine: Steps of optimisation a face, for ifadit.
        accelerator: Lightning's.
        methods: Those that were loaded, by name.
    """

    folder: Path
    refine: int | None = None
    accelerator: str = "auto"
    methods: dict[str, ReversibleAnonymizer] = field(default_factory=dict)

    def anonymize(
        self, files: list[str], method: str, mode: str, seal: str, secret: str, again: str, advance: Advance
    ) -> tuple[Pairs, list[str], str]:
        """Anonymize uploaded pictures.

        Args:
            files: Their paths.
            method: Name of a method.
            mode: ``verify`` or ``decoy``.
            seal: ``none``, ``code`` or ``original``.
            secret: What was typed.
            again: What was typed again.
            advance: Told the share of pictures that are done.

        Returns:
            Pictures before and after with their captions, the files to download, and a sentence.

        Raises:
            ValueError: Nothing was dropped, the secrets differ or are missing, or options do not go together.
        """
        network = self._method(method)
        steps = getattr(network, "refine", None)
        hiding = Hiding(method, weights_hash(network), network.size, mode, seal, "picture", "all", "fail", False, steps)
        check_options(network, hiding)
        given = None
        if needs_secret(network, hiding):
            if secret != again:
                raise ValueError("the two secrets differ")
            given = _secret(secret)

        def work(found: list[Found], folder: Path, bar: Progress) -> int:
            return anonymize_files(found, folder, network, hiding, given, Running(1, self.accelerator, bar=bar))

        return self._do(files, work, advance)

    def recover(self, files: list[str], secret: str, advance: Advance) -> tuple[Pairs, list[str], str]:
        """Recover uploaded pictures: as :meth:`anonymize`."""
        given = _secret(secret)

        def work(found: list[Found], folder: Path, bar: Progress) -> int:
            name = method_of(found)
            network = None if name is None else self._method(name)
            running = Running(1, self.accelerator, bar=bar)
            return recover_files(found, folder, network, name or "none", given, running)

        return self._do(files, work, advance)

    def _method(self, name: str) -> ReversibleAnonymizer:
        if name not in self.methods:
            self.methods[name], _ = load_photo_method(
                name, None, self.refine if name == "ifadit" else None, self.accelerator
            )
        return self.methods[name]

    def _do(self, files: list[str], work: Callable[..., int], advance: Advance) -> tuple[Pairs, list[str], str]:
        if not files:
            raise ValueError("drop some pictures first")
        place = Path(tempfile.mkdtemp(dir=self.folder))
        taken, out = place / "in", place / "out"
        taken.mkdir()
        for file in files:  # each upload lies in a folder of its own; two of one name would not get along
            if (taken / Path(file).name).exists():
                raise ValueError(f"two of the files are called {Path(file).name}")
            shutil.copyfile(file, taken / Path(file).name)
        found, others = find_photos([str(taken)], out)
        if not found:
            raise ValueError("none of these files is a picture")
        bar = _Bar(len(found), advance)
        work(found=found, folder=out, bar=bar)
        told, pairs, made, failed = bar.said(), [], [], []
        entries = manifests.Manifest(out / manifests.NAME, manifests.signing_key()).entries
        for one in found:
            names = entries.get(one.name, {}).get("files", {})
            written = [str(out / name) for name in names if (out / name).is_file()]
            if written:
                shown = next(name for name in written if not name.endswith(SIDECAR))
                pairs += [(str(one.path), "before"), (shown, "after")]
                made += written
            else:
                lines = [line.removeprefix(f"{one.path}: ") for line in told if line.startswith(f"{one.path}: ")]
                failed.append(f"{one.name}: {lines[-1] if lines else 'it was not done'}")
        left = [f"{others} files are no pictures"] if others else []
        return pairs, made, "\n\n".join([f"{len(pairs) // 2} of {len(found)} pictures done.", *failed, *left])


class _Bar(Progress):
    """Progress that is told to a function; what it would print is kept."""

    def __init__(self, total: int, advanced: Advance) -> None:
        self._lines = io.StringIO()
        super().__init__(console=Console(file=self._lines), disable=True)
        self.advanced, self.total, self.count = advanced, total, 0
        self.add_task("", total=total)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count a picture."""
        self.count += 1
        self.advanced(self.count / self.total)

    def said(self) -> list[str]:
        """Lines that were printed."""
        return self._lines.getvalue().splitlines()


def _secret(typed: str) -> Secret:
    if not typed:
        raise ValueError("type a secret")
    return Secret(typed.encode())


def build(desk: Desk) -> Any:
    """The page, a ``gradio.Blocks``.

    Raises:
        ValueError: gradio is not installed.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(desk.folder / "uploads")  # else they would outlive the run
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # it would keep what was typed, the secret too, in the browser
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError("keyveil serve needs gradio: pip install 'keyveil[web]'") from error

    def told(work: Callable[..., Any]) -> Callable[..., Any]:
        """Errors as sentences on the page."""

        def do(*values: Any) -> Any:
            try:
                return work(*values)
            except (ValueError, OSError) as error:
                raise gr.Error(" ".join(str(error).split()), print_exception=False) from None

        return do

    @told
    def anonymize(files, method, mode, seal, secret, again, progress=gr.Progress()):  # noqa: ANN001, ANN202, B008
        return desk.anonymize(files or [], method, mode, seal, secret, again, progress)

    @told
    def recover(files, secret, progress=gr.Progress()):  # noqa: ANN001, ANN202, B008
        return desk.recover(files or [], secret, progress)

    def results() -> tuple[Any, Any, Any]:
        said, shown = (
            gr.Markdown(),
            gr.Gallery(label="Before and after", columns=2, object_fit="contain", interactive=False),
        )
        return shown, gr.File(label="Download", file_count="multiple", interactive=False), said

    with gr.Blocks(title="keyveil", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        with gr.Tab("Anonymize"), gr.Row():
            with gr.Column(scale=1):
                files = gr.File(label="Pictures", file_count="multiple", file_types=["image"])
                method = gr.Radio(list(METHODS), value="ifadit", label="Method")
                mode = gr.Radio(
                    ["verify", "decoy"],
                    value="verify",
                    label="Mode",
                    info="verify: a wrong secret is refused. decoy: it gives yet another face.",
                )
                seal = gr.Radio(
                    ["none", "code", "original"],
                    value="none",
                    label="Seal",
                    info="original: the faces themselves travel along, encrypted, and come back bit for bit.",
                )
                secret = gr.Textbox(label="Secret", type="password")
                again = gr.Textbox(label="Secret again", type="password")
                button = gr.Button("Anonymize", variant="primary")
            with gr.Column(scale=2):
                shown, made, said = results()
            button.click(
                anonymize,
                [files, method, mode, seal, secret, again],
                [shown, made, said],
                api_name="anonymize",
                concurrency_id="one",
            )
        with gr.Tab("Recover"), gr.Row():
            with gr.Column(scale=1):
                files = gr.File(label="Anonymized pictures, and records beside them", file_count="multiple")
                secret = gr.Textbox(label="Secret", type="password")
                button = gr.Button("Recover", variant="primary")
            with gr.Column(scale=2):
                shown, made, said = results()
            button.click(recover, [files, secret], [shown, made, said], api_name="recover", concurrency_id="one")
    return page
