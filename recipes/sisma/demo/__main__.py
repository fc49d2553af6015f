"""Paint a mask in the browser and get a picture: ``python -m recipes.sisma.demo``.

    python -m recipes.sisma.demo                        # the small packaged model of drawn faces
    python -m recipes.sisma.demo pipe=exports/quick     # a folder of recipes.sisma.export, or OWNER/NAME on the hub
    python -m recipes.sisma.demo run=runs/quick         # a training run, without exporting it

Only this machine can open the page unless ``host`` is set; the page sends nothing to the network.
"""

import os
import sys
import tempfile
from dataclasses import dataclass

import torch

from recipes.sisma.arguments import UsageError, from_command_line, run_command
from recipes.sisma.demo.jobs import JobRunner
from recipes.sisma.demo.page import build_page
from recipes.sisma.demo.server import LOCAL, serve
from ssmgen import MaskToImage


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        pipe: a folder that recipes.sisma.export wrote, a hub id OWNER/NAME, or the name of a packaged model.
        run: the folder of a training run, used instead of ``pipe``; loads its newest checkpoint.
        size: a side or height x width in pixels, such as ``192x96``, if the canvas is to have another size than the
            model's. Of a model with several, the first is taken.
        device: where the model runs; empty means CUDA if available, else the CPU.
        host: address to serve at. 0.0.0.0 serves anyone who can reach this machine, without a password.
        port: port to serve at; 0 picks a free one.
        timeout: seconds after which a job is stopped.
        open_browser: open the page in a browser.
    """

    pipe: str = "drawn-faces"
    run: str = ""
    size: str = ""
    device: str = ""
    host: str = "127.0.0.1"
    port: int = 7860
    timeout: float = 120.0
    open_browser: bool = False


def main(argv: list[str]) -> None:
    """Load the model and serve the page until interrupted."""
    settings = from_command_line(Settings(), argv)
    if not 0 <= settings.port < 65536:
        raise UsageError(f"port must be from 0 to 65535, got {settings.port}")
    if not settings.timeout > 0:
        raise UsageError(f"timeout must be positive, got {settings.timeout}")
    pipe = load_pipe(settings)
    with tempfile.TemporaryDirectory(prefix="ssmgen-demo-") as folder:
        # The page writes no files; should gradio write one, it goes when the page does.
        os.environ["GRADIO_TEMP_DIR"] = folder
        runner = JobRunner(pipe, timeout=settings.timeout)
        page = build_page(runner)
        address = serve(page, runner, host=settings.host, port=settings.port, open_browser=settings.open_browser)
        print(f"{runner.about()}\nopen {address} (Ctrl-C stops it)", flush=True)
        if settings.host not in LOCAL:
            print(f"host={settings.host}: others on the network can use this page", file=sys.stderr)
        page.block_thread()


def load_pipe(settings: Settings) -> MaskToImage:
    """The pipeline named by ``run`` or ``pipe``, on its device."""
    if settings.run:
        from recipes.sisma.runs import find_run, load_run

        pipe, _ = load_run(find_run(settings.run))
    else:
        pipe = MaskToImage.from_pretrained(settings.pipe)
    if settings.size or len(pipe.recipe.sizes) > 1:
        from recipes.sisma.runs import resized

        pipe = resized(pipe, settings.size or "x".join(map(str, pipe.recipe.size)))
    return pipe.to(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    run_command(main)
