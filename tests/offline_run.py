"""Everything that needs no download, in a process whose every use of a network address is reported.

``python tests/offline_run.py FOLDER`` prints one line per event; tests/test_offline.py runs it.
"""

import importlib
import sys
import traceback
from pathlib import Path

LOOK_UPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
SENDING = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"}
OF_THIS_MACHINE = ("::1", 0)  # bound by urllib3 to see whether there is IPv6


def report(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: sees what every library of the process does with Python's sockets, whatever it has patched."""
    address = arguments[1] if event in SENDING else None
    if event in LOOK_UPS or (isinstance(address, tuple) and address != OF_THIS_MACHINE):  # others are AF_UNIX
        print("network:", event, *map(str, arguments), *traceback.format_stack(limit=8), flush=True)


def import_all() -> None:
    """Every module of the library and its recipes."""
    root = Path(__file__).parents[1]
    for package in ("ssmgen", "recipes"):
        for file in sorted((root / package).rglob("*.py")):
            if file.name != "__main__.py":
                importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts))


def main(folder: Path) -> None:
    """Build, train, evaluate, export, load and sample."""
    import_all()
    from networks import tiny_network
    from recipe_runs import words

    import ssmgen
    from recipes.sisma import evaluate, export, sample, train
    from ssmgen import MaskToImage
    from ssmgen.data import draw_face, write_png
    from ssmgen.pipeline import MaskToImagePipeline

    ssmgen.build("sisma-debug")
    train.main(words(folder, "steps=2", "sample_every=1", "num_workers=2", "tracker=tensorboard"))
    train.main(words(folder, "steps=3", "resume=auto", "tracker=trackio"))
    run, mask = f"run={folder / 'run'}", draw_face(0, 64)[1]
    evaluate.main([run, "masks=4", "diversity_masks=1"])
    write_png(folder / "mask.png", mask)
    sample.main([run, f"mask={folder / 'mask.png'}", f"out={folder / 'samples'}"])
    export.main([run, f"out={folder / 'exported'}"])
    MaskToImage.from_pretrained(folder / "exported")(mask, steps=1)
    MaskToImagePipeline(MaskToImage.from_pretrained("drawn-faces"))(mask, num_inference_steps=1)
    tiny_network().save_pretrained(folder / "tiny")
    ssmgen.build("autoencoder-tiny", source=str(folder / "tiny"))
    print("done")


if __name__ == "__main__":
    sys.addaudithook(report)
    main(Path(sys.argv[1]))
