"What watches a run, in several processes."
import datetime, os, random
from pathlib import Path

import pytest, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import forks
from conftest import free_port
from hues import HUES, pictures
from simclr_nb.augmentations import Augmentation, RandomFlip, RandomResizedCrop
from simclr_nb.training.online import OnlineEvalCallback, OnlineProbeCallback
from simclr_nb.data.sets import ImageSet
from simclr_nb.features.neighbors import knn_evaluator
from simclr_nb.learner import simclr_learner

AUGMENT = Augmentation(32, RandomResizedCrop(), RandomFlip())


def pretrained(folder, watch, rank=0, world=1):
    images = ImageSet(sorted(Path(folder).rglob('*.png')), [k for k in range(3) for _ in range(8)], list(HUES))
    learn = simclr_learner(images, 'resnet18_0.25x', augment=AUGMENT, num_workers=0)
    if world > 1: learn.model = DistributedDataParallel(learn.model)
    cbs = []
    if watch:
        cbs = [OnlineProbeCallback(), OnlineEvalCallback(knn_evaluator(images, 32, k=5, num_workers=0), every=2)]
    torch.manual_seed(1)
    random.seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, lr=.1, cbs=cbs)
    return learn, cbs, (torch.rand(1).item(), random.random())


def one_process(rank, world, folder, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))     # as torchrun does; fastai reads them
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    try:
        plain, _, after = pretrained(folder, False, rank, world)
        learn, (probe, neighbors), after_watched = pretrained(folder, True, rank, world)
        states = zip(plain.model.state_dict().values(), learn.model.state_dict().values())
        same = after == after_watched and all(torch.equal(a, b) for a, b in states)
        torch.save(dict(same=same, probe=probe.accuracy, neighbors=neighbors.accuracies), f'{folder}/{rank}.pt')
    finally: dist.destroy_process_group()


@pytest.mark.process
def test_watchers_in_two_processes(tmp_path):
    "Under DistributedDataParallel training is untouched, and only the first process looks for neighbors."
    pictures(tmp_path, 8, 'png')
    forks.together(one_process, 2, (2, str(tmp_path), free_port()), 120)
    first, second = (torch.load(tmp_path/f'{r}.pt') for r in range(2))
    assert first['same'] and second['same']
    assert list(first['neighbors']) == [2, 3] and second['neighbors'] == {}
    assert first['probe'] is not None and 0 <= first['probe'] <= 100
