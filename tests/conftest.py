"""Tests that compare processes or bits are for the CPU.

`SIMCLR_TEST_CUDA=1` leaves the GPUs visible for the tests that need one."""
import os, socket

if 'SIMCLR_TEST_CUDA' not in os.environ: os.environ['CUDA_VISIBLE_DEVICES'] = ''


def free_port():
    "A port of this machine that nobody listens on."
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]
