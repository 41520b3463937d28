"""Keep a run in the tree, small: its settings, history and report, encoder and head in half precision.

    python tools/keep_run.py runs/cifar10 nbs/cifar10
"""
import json, shutil, sys
from pathlib import Path

from simclr_nb.encoder import load_encoder, save_encoder
from simclr_nb.weights.files import load_head, save_head


def keep(run, to):
    to.mkdir(parents=True, exist_ok=True)
    for name in ('config.json', 'history.csv', 'report.json'): shutil.copy(run/name, to/name)
    save_encoder(load_encoder(run/'encoder.safetensors').half(), to/'encoder.safetensors')
    save_head(load_head(run/'head.safetensors').half(), to/'head.safetensors')
    settings = json.loads((to/'config.json').read_text())
    size = sum(file.stat().st_size for file in to.iterdir())
    print(f'{to}: {settings["source"]}, {settings["epochs"]} epochs, {size/1e6:.1f} MB')


if __name__ == '__main__': keep(*map(Path, sys.argv[1:]))
