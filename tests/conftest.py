"Tests that compare processes or bits are for the CPU: `SIMCLR_TEST_CUDA=1` leaves the GPUs in sight for those that ask for one."
import os

if 'SIMCLR_TEST_CUDA' not in os.environ: os.environ['CUDA_VISIBLE_DEVICES'] = ''
