"Fine-tuning on a grid of learning rates and weight decays; sets and settings that make no sense; lists of labels."
import math, os
from dataclasses import replace
from functools import partial

import numpy as np, pytest, torch
from torch import nn

from hues import pictures
from simclr_nb.data.sets import ImageSet
from simclr_nb.encoder import build_encoder
from simclr_nb.evaluation.finetune import finetune, label_indices, set_bn_momentum
from simclr_nb.features.metrics import permutation_test
from simclr_nb.evaluation.classifier import (
    ClassifierSettings, check_labels, classification_report, classifier_learner, decay_groups, fit_cosine)
from simclr_nb.evaluation.linear import compare_encoders, linear_evaluation


def test_finetuning_takes_a_grid_and_skips_what_diverges(tmp_path):
    train, test = pictures(tmp_path/'train', 6), pictures(tmp_path/'test', 4)
    encoder = build_encoder('resnet18_0.25x', 32)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    s = ClassifierSettings(lr=[1e30, .02], wd=[0., 1e-4], steps=6, batch_size=9, fraction=.34, num_workers=0)
    out = finetune(encoder, train, test, 32, s)
    assert out.chosen[0] == .02 and out.tried[1e30, 0.] == -np.inf and len(out.tried) == 4
    for k, v in encoder.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=0, atol=0)


def test_weight_decay_leaves_batch_norm_out(tmp_path):
    "As in the official code. Without a gradient a step is weight decay alone."
    train = pictures(tmp_path, 3)
    s = ClassifierSettings(epochs=1, batch_size=9, num_workers=0)
    learn = classifier_learner(build_encoder('resnet18_0.25x', 32), train, 32, s, partial(decay_groups, wd=.1))
    fit_cosine(learn, s, .02, 60)
    before = {k: v.clone() for k, v in learn.model.named_parameters()}
    norms = {id(p) for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    learn.opt.clear_state()
    learn.opt.set_hyper('lr', .5)
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    learn.opt.step()
    assert norms
    for k, p in learn.model.named_parameters():
        shrink = 1. if id(p) in norms else 1 - .5*.1*1.9             # Nesterov counts the first step 1 + 0.9 times
        torch.testing.assert_close(p.detach(), before[k]*shrink)


# Sets and settings that make no sense

def flat(): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())

def linear(encoder, train, test): return linear_evaluation(encoder, train, test, 8, ClassifierSettings(num_workers=0))
def fine(encoder, train, test): return finetune(encoder, train, test, 8, ClassifierSettings(num_workers=0))
def both(encoder, train, test): return compare_encoders({'a': encoder}, train, test, 8, num_workers=0)

@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hues')
    return pictures(folder/'train', 6), pictures(folder/'test', 4)


@pytest.mark.parametrize('protocol', [linear, fine, both])
def test_classes_that_do_not_train_are_named(sets, protocol):
    train, test = sets
    part = replace(train.subset(np.flatnonzero(train.labels != 1).tolist()), classes=train.classes)
    with pytest.raises(ValueError, match='green'): protocol(flat(), part, test)


@pytest.mark.parametrize('protocol', [linear, fine, both])
@pytest.mark.parametrize('labels, words', [
    ([.5, 1.5], 'must be integers'), ([0, -1], 'integers from 0, got -1'),
    ([0, 3], 'go up to 3, but there are 3 classes')])
def test_labels_that_are_no_classes_are_refused(sets, protocol, labels, words):
    train, test = sets
    for a, b in (([*train.labels[2:], *labels], test.labels), (train.labels, [*test.labels[2:], *labels])):
        wrong = ImageSet(train.files, a, train.classes), ImageSet(test.files, b, train.classes)
        with pytest.raises(ValueError, match=words): protocol(flat(), *wrong)


def test_this_evaluation_takes_one_class_for_each_image(sets):
    several = ImageSet(sets[0].files, np.eye(3, dtype=int)[sets[0].labels])
    with pytest.raises(ValueError, match='one class for each image'): check_labels(several, several)


@pytest.mark.parametrize('name, value, words', [
    ('epochs', -3, 'epochs must be a whole number, 1 or more, got -3'), ('epochs', 0, 'epochs must be'),
    ('epochs', 1.5, 'epochs must be'), ('epochs', math.nan, 'epochs must be'), ('crop', 0, 'crop must be'),
    ('lr', 0, 'lr must be a number, above 0, got 0'), ('lr', [.1, -1.], 'lr must be'), ('lr', math.nan, 'lr must be'),
    ('lr', math.inf, 'lr must be')])
def test_settings_out_of_range_are_named(name, value, words):
    with pytest.raises(ValueError, match=words): ClassifierSettings(**{name: value})


@pytest.mark.parametrize('name, value', [('steps', 0), ('steps', -5), ('wd', -1e-4), ('wd', [0., math.nan])])
def test_settings_of_fine_tuning_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f'{name} must be'): ClassifierSettings(**{name: value})
    with pytest.raises(ValueError, match='steps must be'): set_bn_momentum(flat(), 0)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match='1 of 2 rows of logits are not finite'):
        classification_report(torch.tensor([[0., 1.], [math.nan, 0.]]), [1, 0])
    with pytest.raises(ValueError, match='samples must be'): permutation_test([0, 1], [0, 1], [1, 1], samples=0)


# Lists

def test_lists_of_names_with_spaces_and_other_bytes(tmp_path):
    names = ['a b.png', 'two  spaces .png', os.fsdecode(b'caf\xe9.png'), 'ü.png', 'plain.png']
    images = ImageSet(names, [0, 1, 0, 1, 0])
    for ending in (b'\n', b'\r\n'):
        (tmp_path/'list.txt').write_bytes(ending.join(map(os.fsencode, names[:4])) + ending)
        assert label_indices(images, files=tmp_path/'list.txt') == [0, 1, 2, 3]
    (tmp_path/'list.txt').write_bytes(b'caf\xe8.png')
    with pytest.raises(ValueError, match=r'1 of the 1 names .* are no images of this set: caf\\udce8.png') as e:
        label_indices(images, files=tmp_path/'list.txt')
    str(e.value).encode()
