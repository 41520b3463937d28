"""Tests that compare processes or bits are for the CPU.

`SIMCLR_TEST_CUDA=1` leaves the GPUs visible for the tests that need one."""
import os

if 'SIMCLR_TEST_CUDA' not in os.environ: os.environ['CUDA_VISIBLE_DEVICES'] = ''
