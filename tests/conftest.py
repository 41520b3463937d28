"""Tests that compare processes or bits are for the CPU.

`SIMCLR_TEST_CUDA=1` leaves the GPUs visible for the tests that need one."""
import os, socket
from pathlib import Path

import pytest

if 'SIMCLR_TEST_CUDA' not in os.environ: os.environ['CUDA_VISIBLE_DEVICES'] = ''


def free_port():
    "A port of this machine that nobody listens on."
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def quick_figures():
    "Figures of commands are files of one pixel: drawing takes longer than a run of a few steps."
    import matplotlib.pyplot as plt
    from PIL import Image
    from simclr_nb.commands import report, run
    def save(fig, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (1, 1)).save(path)
        plt.close(fig)
    with pytest.MonkeyPatch.context() as patch:
        for module in (report, run): patch.setattr(module, 'save_figure', save)
        yield
