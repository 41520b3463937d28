"""Ordinary use of the library, for a type checker: `basedpyright tests/ordinary_use.py` has nothing to say of it.

It is read, not run.
"""
from pathlib import Path

import torch
from torch import Tensor, nn

from simclr_nb.augmentations import Augmentation, simclr_augmentations
from simclr_nb.data.datasets import StepSampler, TwoCropDataset, train_loader
from simclr_nb.data.sets import ImageSet, folder_images
from simclr_nb.encoder import Encoder, build_encoder, load_encoder, save_encoder
from simclr_nb.evaluation.finetune import finetune
from simclr_nb.evaluation.linear import linear_evaluation
from simclr_nb.features.extract import extract_features
from simclr_nb.features.logistic import LogisticClassifier
from simclr_nb.features.neighbors import NeighborClassifier
from simclr_nb.lars import LARS, param_groups
from simclr_nb.learner import SimCLRLearner, simclr_learner
from simclr_nb.ntxent import NTXentLoss, nt_xent
from simclr_nb.projection import SimCLR, projection_head

# three lines
learn: SimCLRLearner = simclr_learner('photos', arch='resnet18', size=64, batch_size=128)
learn.pretrain(10)
path: Path = learn.save_encoder('encoder.safetensors')

# a set of images, and what an augmentation makes of it
images: ImageSet = folder_images('photos')
some: ImageSet = images.subset(range(10))
grouped: ImageSet = images.with_positives('folder')
augment: Augmentation = simclr_augmentations(64)
views: list[Tensor] = augment(torch.zeros(3, 80, 80, dtype=torch.uint8))
dataset = TwoCropDataset(images, augment)
crops, params = dataset.cut((0, 0, 0), 0)
sampler = StepSampler(len(images), 128)
batch = sampler.batch(3)

# a loop of one's own
encoder: Encoder = build_encoder('resnet18', 64)
model = SimCLR(encoder, projection_head(encoder.num_features))
optimizer = LARS(param_groups(model), lr=.3)
loss_of: nn.Module = NTXentLoss(.1)
for x, p, *_ in train_loader(images, augment, 128):
    h, z = model(augment.views(x, p))
    loss: Tensor = nt_xent(z)
    loss.backward()
    optimizer.step()

# how good is it?
save_encoder(encoder, path, note='mine')
h_train, idxs = extract_features(load_encoder(path), images, 64)
size: int = encoder.config['size']
score: float = LogisticClassifier().fit(h_train, [0, 1]).score(h_train, [0, 1])
guess = NeighborClassifier().fit(h_train, [0, 1]).predict(h_train)
trained = linear_evaluation(encoder, images, some, 64)
tuned: nn.Module = finetune(encoder, images, some, 64).model
top1: float = trained.scores['top1']
