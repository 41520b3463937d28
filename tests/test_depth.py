"Pictures that are no 8-bit RGB: read without loss, trained on, embedded, judged, in one channel or four."
import json, warnings
from dataclasses import fields, replace

import cv2, numpy as np, pytest, torch
from PIL import Image, ImageOps

from simclr_nb.commands import main as cli
from simclr_nb.augmentations import Augmentation, RandomResizedCrop, simclr_augmentations
from simclr_nb.data.datasets import EvalDataset, TwoCropDataset
from simclr_nb.data.channels import augmentation_for_channels, read_array, with_channels
from simclr_nb.encoder import load_encoder
from simclr_nb.features.copies import find_copies, thumbnails
from simclr_nb.features.extract import extract_features
from simclr_nb.data.files import BadImage
from simclr_nb.operations import broader_augmentations
from simclr_nb.training.views import apply_cpu
from simclr_nb.data.sets import ImageSet, folder_images
from simclr_nb.evaluation import transfer_sets
from simclr_nb.using.vectors import read_vectors

tifffile = pytest.importorskip('tifffile')
settings = dict(arch='resnet18_0.125x', size=32, batch_size=8, epochs=2, lr=.1, num_workers=0)


def smooth(seed, channels, top):
    coarse = np.random.default_rng(seed).uniform(0, top, (5, 6, channels)).astype(np.float32)
    return cv2.resize(coarse, (60, 48), interpolation=cv2.INTER_LINEAR).reshape(48, 60, channels)


@pytest.fixture(scope='module', params=[1, 4])
def deep(request, tmp_path_factory):
    "24 pictures of 12 bits in 16, with one channel or four, in two classes."
    folder = tmp_path_factory.mktemp(f'deep{request.param}')
    for i in range(24):
        x = smooth(i, request.param, 2000 + 2000*(i % 2)).round().astype(np.uint16)
        file = folder/f'class{i % 2}'/f'{i:02}.tif'
        file.parent.mkdir(exist_ok=True)
        tifffile.imwrite(file, np.moveaxis(x, 2, 0), photometric='minisblack')
    return folder, request.param


def arguments(source, out, **more):
    options = settings | more
    return ['pretrain', str(source), '--out', str(out),
            *(str(w) for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v))]


def test_a_set_of_16_bits_trains_and_its_encoder_reads_as_it_was_trained(deep, tmp_path, capsys):
    folder, channels = deep
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cli.main(arguments(folder, tmp_path/'run', channels=channels))
        cli.main(['embed', str(tmp_path/'run'), str(folder), '--num-workers', '0'])
        how = ['--protocol', 'knn', '--seeds', '0', '--num-workers', '0']
        cli.main(['evaluate', str(tmp_path/'run'), str(folder), *how])
        cli.main(['search', str(tmp_path/'run'), str(folder/'class0/00.tif'), '--k', '3'])
    info = load_encoder(tmp_path/'run/encoder.safetensors').config
    assert info['channels'] == channels and all(0 <= v < 200 for v in info['pixels']['low'])
    assert all(2500 < v <= 4000 for v in info['pixels']['high'])
    vectors = read_vectors(tmp_path/'run/vectors.safetensors')
    assert len(vectors.h) == 24 and vectors.h.std(0).max() > 0
    page = (tmp_path/'run/search.html').read_text()
    assert page.count('data:image/jpeg') == 4                       # no browser could show the files
    scores = json.loads((tmp_path/'run/report.json').read_text())['scores']
    assert {row['encoder'] for row in scores} >= {'simclr', 'pixels', 'untrained'}


def test_features_differ_where_images_differ_below_8_bits(tmp_path):
    x = smooth(0, 1, 60_000).round().astype(np.uint16)
    y = x.copy()
    y[20:24, 20:24] += 3                                            # 8 bits would need 257
    for name, im in (('a', x), ('b', y)): tifffile.imwrite(tmp_path/f'{name}.tif', im[..., 0])
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten())
    images = folder_images(tmp_path)
    a, b = extract_features(net, with_channels(images, 1, 0, 65_535), 32, num_workers=0)[0]
    assert (a != b).any()
    a, b = extract_features(net, images, 32, num_workers=0)[0]      # as RGB of 8 bits they are one picture
    assert torch.equal(a, b)


def test_eight_bit_rgb_read_as_it_is_agrees_with_the_usual_way(tmp_path):
    for i in range(4): Image.fromarray(smooth(i, 3, 255).astype(np.uint8)).save(tmp_path/f'{i}.png')
    images = folder_images(tmp_path)
    deep = with_channels(images, 3)
    assert deep.depth.low == [0]*3 and deep.depth.high == [255]*3
    augment = Augmentation(32, RandomResizedCrop())
    for i in range(4):
        usual, same = TwoCropDataset(images, augment)[0, i][0], TwoCropDataset(deep, augment)[0, i][0]
        assert (usual/255 - same).abs().max() < .02
        assert (EvalDataset(images, 32)[i][0]/255 - EvalDataset(deep, 32)[i][0]).abs().max() < .02


@pytest.fixture
def pictures(tmp_path):
    "Nine pictures of 5 channels, which nothing reads as RGB, and one more: the first, slightly brighter."
    for i in range(9): np.save(tmp_path/f'{i}.npy', smooth(i, 5, 3000))
    np.save(tmp_path/'9.npy', smooth(0, 5, 3000)*1.001)
    return with_channels(folder_images(tmp_path), 5, 0, 4000)

def test_copies_are_found_among_pictures_with_channels(pictures):
    "A set that loses its channels on the way shows no picture of them at all, and no copy."
    shown = thumbnails(pictures)
    assert not shown.isnan().any() and thumbnails(replace(pictures, depth=None)).isnan().all()
    found = find_copies(pictures, k=5)
    assert [(c.first, c.second, c.reason) for c in found] == [(0, 9, 'same picture')]

def test_copies_of_a_set_keep_everything_that_is_known_of_it(pictures):
    "Every field is said to be kept or changed here: a new one has to be thought of."
    full = replace(pictures, labels=np.array([0, 2]*5), classes=['a', 'b', 'c'], groups=np.arange(10)//2,
                   columns=dict(place=np.array([*'vvwwxxyyzz'])))
    fewer, both, dense = full.subset(range(3, 8)), full.joined(full), transfer_sets._renumbered(full)
    assert {f.name for f in fields(full)} == {'files', 'labels', 'classes', 'columns', 'groups', 'depth'}
    for images in (fewer, both, dense):
        assert images.depth == full.depth and set(images.columns) == {'place'} and images.groups is not None
        assert not images[0].getextrema() == ((0, 0),)*3
        for i, file in enumerate(images.files):
            k = int(file.stem)
            assert images.columns['place'][i] == full.columns['place'][k]
            assert images.classes[images.labels[i]] == 'ac'[k % 2]
    assert fewer.groups.tolist() == [1, 2, 2, 3, 3] and dense.classes == ['a', 'c']
    assert both.groups.tolist() == [i//2 for i in range(20)]                       # no pair across the sets
    with pytest.raises(ValueError, match='read differently'): full.joined(replace(full, depth=None))


def test_gray_views_are_those_of_gray_rgb():
    "On one channel brightness and contrast do what they do to R = G = B, with every definition of them."
    crops = torch.rand(6, 2, 1, 24, 24)
    for colors in ('simclrv1', 'simclrv2', 'torchvision'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            one = augmentation_for_channels(simclr_augmentations(24, implementation=colors), 1)
        params = torch.stack([torch.from_numpy(one.draw_views((0, 0, i), 24, 24)[1]) for i in range(6)])
        gray = one.views(crops, params)
        three = one.views(crops.expand(-1, -1, 3, -1, -1), params)
        torch.testing.assert_close(gray.expand(-1, 3, -1, -1), three, atol=5e-4, rtol=0)    # luma sums to .9999
        torch.testing.assert_close(one.views(crops, params, apply_cpu), gray)
        assert (gray != crops.transpose(0, 1).flatten(0, 1)).any()


def test_what_needs_rgb_is_left_out_and_named():
    with pytest.warns(UserWarning, match='left out.*RandomEqualize, RandomGrayscale, RandomSobel, hue, saturation'):
        one = augmentation_for_channels(broader_augmentations(32), 4)
    params = torch.from_numpy(np.stack([one.draw_views((0, e, 0), 40, 40)[1] for e in range(50)]))
    views = one.views(torch.rand(50, 2, 4, 32, 32), params)
    assert views.shape == (100, 4, 32, 32) and views.min() >= 0 and views.max() <= 1


@pytest.mark.parametrize('name, make, why', [
    ('rgb.png', lambda f: Image.fromarray(smooth(0, 3, 255).astype(np.uint8)).save(f), 'has 3 channels'),
    ('nan.npy', lambda f: np.save(f, np.full((9, 9), np.nan)), 'NaN'),
    ('flat.npy', lambda f: np.save(f, np.zeros(9)), 'two or three dimensions'),
    ('cut.tif', lambda f: f.write_bytes(b'II*\0' + bytes(40)), 'cannot read'),
    ('words.npy', lambda f: f.write_text('a shopping list'), 'cannot read')])
def test_what_does_not_fit_is_named_and_left_out(tmp_path, name, make, why):
    for i in range(3): tifffile.imwrite(tmp_path/f'{i}.tif', smooth(i, 1, 4000)[..., 0].astype(np.uint16))
    make(tmp_path/name)
    images = with_channels(ImageSet([*sorted(tmp_path.glob('?.tif')), tmp_path/name]), 1, 0, 4000)
    with pytest.raises(BadImage, match=why) as e: images.depth.read(tmp_path/name)
    assert name in str(e.value)
    dataset = TwoCropDataset(images, Augmentation(32, RandomResizedCrop()))
    assert dataset[0, 3][-1] in (0, 1, 2) and dataset.unreadable_files() == [tmp_path/name]
    assert EvalDataset(images, 32)[3] is None


@pytest.mark.parametrize('turn', range(1, 9))
def test_pictures_are_put_upright_as_pillow_does_it(tmp_path, turn):
    import tifffile
    x = np.random.default_rng(turn).integers(0, 256, (20, 30), np.uint8)
    exif = Image.Exif()
    exif[274] = turn
    Image.fromarray(x).save(tmp_path/'a.png', exif=exif)
    Image.fromarray(x).save(tmp_path/'a.jpg', exif=exif)
    tifffile.imwrite(tmp_path/'a.tif', x.astype(np.uint16)*200, extratags=[(274, 'H', 1, turn, True)])
    want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path/'a.png')))
    np.testing.assert_array_equal(read_array(tmp_path/'a.png')[..., 0], want)
    np.testing.assert_array_equal(read_array(tmp_path/'a.tif')[..., 0], want*np.uint16(200))
    jpeg = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path/'a.jpg')))
    np.testing.assert_array_equal(read_array(tmp_path/'a.jpg')[..., 0], jpeg)


def test_compressed_tiff(tmp_path):
    "LZW, as maps have it, which tifffile reads with another package only."
    x = np.random.default_rng(0).integers(0, 2**16, (20, 30, 3), np.uint16)
    for name, picture in (('gray', x[..., 0]), ('color', x[..., ::-1])):
        assert cv2.imwrite(str(tmp_path/f'{name}.tif'), picture, [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    np.testing.assert_array_equal(read_array(tmp_path/'gray.tif'), x[..., :1])
    np.testing.assert_array_equal(read_array(tmp_path/'color.tif'), x)


def test_dicom(tmp_path):
    pydicom = pytest.importorskip('pydicom')
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian
    x = smooth(0, 1, 4000)[..., 0].astype(np.uint16)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = '1.2.840.10008.5.1.4.1.1.7', '1.2.3'
    for kind in ('MONOCHROME2', 'MONOCHROME1'):
        file = FileDataset(tmp_path/f'{kind}.dcm', {}, file_meta=meta, preamble=bytes(128))
        file.Rows, file.Columns, file.PhotometricInterpretation = *x.shape, kind
        file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit = 1, 16, 12, 11
        file.PixelRepresentation, file.RescaleSlope, file.RescaleIntercept = 0, 2, -1000
        file.PixelData = x.tobytes()
        file.save_as(tmp_path/f'{kind}.dcm', enforce_file_format=True)
        got = read_array(tmp_path/f'{kind}.dcm')[..., 0]
        shown = x.astype(float) if kind == 'MONOCHROME2' else 4095. - x          # whatever this picture's brightest is
        np.testing.assert_array_equal(got, 2*shown - 1000)
    assert with_channels(folder_images(tmp_path), 1).depth.channels == 1
    assert pydicom.__version__


def test_the_command_says_what_does_not_go_together(tmp_path, deep):
    folder, channels = deep
    for more, why in ((dict(value_range='5'), 'two numbers'), (dict(value_range='9,5'), 'must rise'),
                      (dict(channels=7), f'has {channels}'), (dict(cache=5), 'cache keeps 8-bit RGB')):
        options = dict(channels=channels) | more
        with pytest.raises(SystemExit, match=why): cli.main(arguments(folder, tmp_path/'run', **options))
    assert not (tmp_path/'run').exists()
