"A frozen encoder stays as it was, bit for bit, whatever mode it comes in."
import pytest, torch
from torch import nn

from simclr_nb.data import load_images
from simclr_nb.evaluation import embed


@pytest.mark.parametrize('training', [True, False])
def test_no_parameter_and_no_running_statistic_moves(training):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train(training)
    net[1].eval()                                                  # a mode of its own
    before, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    cells = load_images('solar_cells').subset(range(20))
    (a, _), (b, _) = (embed(net, cells, 32, num_workers=0) for _ in range(2))
    torch.testing.assert_close(a, b, rtol=0, atol=0)               # dropout is off
    assert not a.requires_grad and [m.training for m in net.modules()] == modes
    for k, v in net.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=0, atol=0)
