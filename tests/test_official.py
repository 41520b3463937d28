"""The official checkpoints: against the official forward pass, a reference for small files, and damage.

The large golden files are looked for in ../shared/golden, or where SIMCLR_GOLDEN says; without them their tests
are skipped."""
import os, pickle, random, resource, signal, struct, sys, tarfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import forks, tensor_bundle as tb
from simclr_nb.encoder import adapt_channels
from simclr_nb.core import BadCheckpoint
from simclr_nb.weights.bundle import Entry, read_index, read_table
from simclr_nb.encoder import MaxPoolSame, Wrapped, build_encoder, load_encoder, save_encoder
from simclr_nb.weights.export import convert, export_onnx, torchvision_state
from simclr_nb.weights.official import (center_crop, check_tensors, empty_network, load_official, official_names,
                                preprocess)

root = Path(__file__).resolve().parents[1]
golden = Path(os.environ.get('SIMCLR_GOLDEN', root.parent/'shared'/'golden'))


@contextmanager
def within(seconds):
    "Nothing may hang."
    def late(*_): raise AssertionError(f'still running after {seconds} s')
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

def state(official):
    "All tensors of what load_official gives."
    parts = {k: getattr(official, k) for k in ('encoder', 'head', 'classifier')}
    return {f'{k}.{n}': t for k, net in parts.items() if net is not None for n, t in net.state_dict().items()}

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def far(a, b): return ((a - b).norm()/b.norm()).item()


# ---------------------------------------------------------------- the official forward pass

@pytest.fixture(scope='session')
def real(tmp_path_factory):
    "The golden checkpoints, unpacked."
    archive = golden/'checkpoints.tar.xz'
    if not archive.exists():
        pytest.skip(f'no golden checkpoints: {archive} is not there (SIMCLR_GOLDEN may name another folder)')
    folder = tmp_path_factory.mktemp('golden')
    with tarfile.open(archive) as f: f.extractall(folder, filter='data')
    return folder

@pytest.mark.parametrize('name, arch, stem', [
    ('resnet18_1x_32_head', 'resnet18', 'cifar'), ('resnet50_1x_224_head', 'resnet50', 'imagenet')])
@torch.no_grad()
def test_golden_parity(real, name, arch, stem):
    encoder, head, classifier, rest = load_official(real/name)
    forward = np.load(real/name/'forward.npz')
    want = {k: torch.from_numpy(forward[k]) for k in ('input_bhwc_u8', 'h', 'z', 'logits')}
    h = encoder(want['input_bhwc_u8'].permute(0, 3, 1, 2)/255)
    z = head(h)
    assert far(h, want['h']) < 1e-5 and far(z, want['z']) < 1e-5 and far(classifier(h), want['logits']) < 1e-5
    assert_close(h, want['h'], rtol=1e-4, atol=1e-4*want['h'].abs().max().item())
    info = encoder.config
    assert rest == ['global_step'] and info['arch'] == arch and info['stem'] == stem

@torch.no_grad()
def test_golden_in_torchvision_and_timm(real):
    "The weights load; the features are the official ones once the pool is TensorFlow's."
    import timm, torchvision
    encoder, _, classifier, _ = load_official(real/'resnet50_1x_224_head')
    want = np.load(real/'resnet50_1x_224_head/forward.npz')
    x = torch.from_numpy(want['input_bhwc_u8']).permute(0, 3, 1, 2)/255
    logits = torch.from_numpy(want['logits'])
    for net in (torchvision.models.resnet50(num_classes=10), timm.create_model('resnet50', num_classes=10)):
        net.load_state_dict(torchvision_state(encoder, classifier))
        assert far(net.eval()(x), logits) > 1e-3
        net.maxpool = MaxPoolSame()
        assert far(net(x), logits) < 1e-5

@pytest.mark.parametrize('name', ['resnet18_1x_32_head', 'resnet50_1x_224_head'])
def test_the_writer_writes_what_tensorflow_wrote(real, name, tmp_path):
    "So what the other tests write is the real format: index and data, byte for byte."
    crc32c = pytest.importorskip('google_crc32c').value
    entries, _ = read_index(real/name/'model.ckpt-12345.index')
    data = (real/name/'model.ckpt-12345.data-00000-of-00001').read_bytes()
    types = {1: '<f4', 9: '<i8'}
    tensors = {n: np.frombuffer(data, types[e.dtype], int(np.prod(e.shape)), e.offset).reshape(e.shape)
               for n, e in entries.items()}
    tb.write_bundle(tmp_path/'again', tensors, crc=crc32c)
    assert (tmp_path/'again.index').read_bytes() == (real/name/'model.ckpt-12345.index').read_bytes()
    assert (tmp_path/'again.data-00000-of-00001').read_bytes() == data

def test_golden_center_crop():
    places = [root/'tests'/'golden'/'augment.npz'] + [golden/'augment.npz']*(golden/'augment.npz').exists()
    for place in places:
        pairs = np.load(place)
        crops = [k for k in pairs if k.startswith('center_crop') and k.endswith('/input')]
        for key in [k.removesuffix('/input') for k in crops]:
            want, image = pairs[f'{key}/output'], torch.from_numpy(pairs[f'{key}/input']).permute(2, 0, 1)
            got = center_crop(image/255, *want.shape[:2])
            assert_close(got.permute(1, 2, 0), torch.from_numpy(want), rtol=0, atol=1e-6)
            if want.shape[0] == want.shape[1]:
                pil = preprocess('official', want.shape[0])(Image.fromarray(pairs[f'{key}/input']))
                assert_close(pil, got.clamp(0, 1), rtol=0, atol=0)


# ---------------------------------------------------------------- small files, a reference

def forward(t, x, blocks, bottleneck):
    "The official network, read off its tensors in their order of creation; x (B, H, W, 3)."
    x, n = torch.from_numpy(x).permute(0, 3, 1, 2).double(), 0
    t = {k: torch.from_numpy(np.asarray(v)).double() for k, v in t.items()}
    def bn(x, scope):
        mean, var, gamma = (t[f'{scope}/{k}'] for k in ('moving_mean', 'moving_variance', 'gamma'))
        shape = (1, -1) + (1,)*(x.ndim - 2)
        beta = t.get(f'{scope}/beta', mean*0)
        return (x - mean.view(shape))/(var.view(shape) + 1e-5).sqrt()*gamma.view(shape) + beta.view(shape)
    def conv(x, stride=1):
        nonlocal n
        number, n = f'_{n}' if n else '', n + 1
        w = t[f'base_model/conv2d{number}/kernel'].permute(3, 2, 0, 1)
        x = F.conv2d(x, w, stride=stride, padding=(w.shape[-1] - 1)//2)
        return bn(x, f'base_model/batch_normalization{number}')
    big = t['base_model/conv2d/kernel'].shape[0] == 7
    x = conv(x, 2 if big else 1).relu()
    if big: # 3 × 3, stride 2; TensorFlow pads even sides at the end only
        odd = x.shape[-1] % 2
        x = F.max_pool2d(F.pad(x, (odd, 1, odd, 1), value=-torch.inf), 3, 2)
    for stage, repeat in enumerate(blocks):
        for b in range(repeat):
            stride = 2 if b == 0 and stage else 1
            shortcut = conv(x, stride) if b == 0 else x
            y = conv(x, 1 if bottleneck else stride).relu()
            y = conv(y, stride if bottleneck else 1)
            if bottleneck: y = conv(y.relu())
            x = (shortcut + y).relu()
    h = z = x.mean((2, 3))
    layers = sum(k.startswith('head_contrastive') and k.endswith('kernel') for k in t)
    for i in range(layers):
        z = bn(z @ t[f'head_contrastive/nl_{i}/dense/kernel'], f'head_contrastive/nl_{i}/batch_normalization')
        if i < layers - 1: z = z.relu()
    return h, z, h @ t['head_supervised/linear_layer/dense/kernel'] + t['head_supervised/linear_layer/dense/bias']

@pytest.mark.parametrize('depth, blocks, stem, size, head', [
    (18, (2, 2, 2, 2), 3, 32, (None, 16)), (34, (3, 4, 6, 3), 7, 70, (20, 8)),
    (50, (3, 4, 6, 3), 7, 64, (None, 16)), (50, (3, 4, 6, 3), 3, 32, (None, None, 16)),
    (101, (3, 4, 23, 3), 7, 64, (None, 16)), (152, (3, 8, 36, 3), 7, 64, (None, 16))])
@torch.no_grad()
def test_small_checkpoint_against_a_reference(tmp_path, depth, blocks, stem, size, head):
    t = tb.official_tensors(depth, .0625, stem, head, seed=depth)
    for k in t: # as after training: branches that matter, but do not explode
        if k.startswith('base_model') and k.endswith('gamma'): t[k] *= np.float32(.7)
    x = np.random.default_rng(1).uniform(0, 1, (2, size, size, 3)).astype('float32')
    encoder, g, classifier, rest = load_official(tb.write_bundle(tmp_path/'model.ckpt-7', t, shards=3, block_size=500))
    h = encoder(torch.from_numpy(x).permute(0, 3, 1, 2))
    z = g(h)
    assert (classifier is None) == (len(head) > 2)
    for ours, want in zip((h, z, classifier(h) if classifier else None), forward(t, x, blocks, depth >= 50)):
        if ours is not None: assert far(ours.double(), want) < 1e-5
    assert encoder.config['arch'] == f'resnet{depth}_0.0625x'
    assert rest == ['global_step'] + [k for k in sorted(t) if k.startswith('head_supervised')]*(classifier is None)
    assert all(p.requires_grad and not p.is_meta for p in encoder.parameters())
    assert not any(b.is_meta for b in encoder.buffers())

@pytest.mark.parametrize('width', [1, 2, 4])
@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_depth_and_width_are_found(depth, width):
    "From shapes alone, at the sizes of the paper; every name has its tensor."
    small = tb.official_tensors(depth, .0625, 7, (None, None))
    def is_wide(name, axis, ndim):
        "Does this axis of a tensor grow with the network's width?"
        if 'supervised' in name: return axis == 0 and name.endswith('linear_layer/dense/kernel')
        return axis >= ndim - 2
    def widened(name, axis, ndim, c):
        if not is_wide(name, axis, ndim) or c in (3, 7) and 'kernel' in name: return c
        return c*16*width
    entries = {}
    for n, a in small.items():
        shape = tuple(widened(n, i, a.ndim, c) for i, c in enumerate(a.shape))
        if n != 'global_step': entries[n] = Entry(1, shape, 0, 0, 0, 0)
    net = empty_network(entries)
    check_tensors(net, official_names(net), entries)
    assert net['encoder'].config['arch'] == f'resnet{depth}' + (f'_{width}x' if width > 1 else '')
    assert all(p.is_meta for p in net.parameters())


# ---------------------------------------------------------------- what may be in a file, and what may not

small = tb.official_tensors(18, .0625, 3, (None, 8), classes=5)

def write(folder, change=lambda t: None, **kwargs):
    t = dict(small)
    change(t)
    return tb.write_bundle(folder/'model.ckpt-12345', t, **kwargs)

def test_parts_may_be_absent(tmp_path):
    def drop(*scopes):
        def change(t):
            for k in list(t):
                if k.startswith(scopes): t.pop(k)
        return change
    bare = load_official(write(tmp_path, drop('head_', 'global_step')))
    assert bare.head is bare.classifier is None and bare.bookkeeping == []
    published = load_official(write(tmp_path, drop('head_contrastive'))) # as the v1 files are
    assert published.head is None and published.classifier.weight.shape == (5, 32)

def test_linear_head(tmp_path):
    def linear(t):
        for k in list(t):
            if k.startswith('head_contrastive/nl_1'): t[k.replace('nl_1', 'l_0')] = t[k]
            if k.startswith('head_contrastive'): t.pop(k)
    head = load_official(write(tmp_path, linear)).head
    assert head.kind == 'linear' and head(torch.rand(3, 32)).shape == (3, 8)

def test_bookkeeping_is_named(tmp_path):
    learned = [k for k in small if k.endswith(('kernel', 'gamma', 'beta', 'bias'))]
    def trained(t):
        for k in list(t): t[f'ema_model/{k}'] = t[k]
        for k in learned: t[f'{k}/Momentum'] = t[k]
    official = load_official(write(tmp_path, trained))
    assert len(official.bookkeeping) == 1 + len(small) + len(learned)
    assert equal(state(official), state(load_official(write(tmp_path))))
    stray = 'base_model/conv2d_99/kernel/Momentum'
    with pytest.raises(BadCheckpoint, match=f'1 unknown: {stray}'):
        load_official(write(tmp_path, lambda t: t.update({stray: np.zeros(3, 'float32')})))

@pytest.mark.parametrize('name', sorted(k for k in small if k != 'global_step'))
def test_every_missing_tensor_is_named(tmp_path, name):
    with pytest.raises(BadCheckpoint, match=f'1 missing: {name}\\.|{name} is missing'):
        load_official(write(tmp_path, lambda t: t.pop(name)))

def put(name, *shape, dtype='float32'):
    "A change that puts zeros into a checkpoint."
    return lambda t: t.update({name: np.zeros(shape, dtype)})

def test_unknown_and_misshapen_tensors_are_named(tmp_path):
    conv, beta = 'base_model/conv2d_4/kernel', 'base_model/batch_normalization_3/beta'
    def as_float64(t): t[conv] = t[conv].astype('float64')
    def without_two(t):
        t.pop(conv)
        t.pop(beta)
    for change, words in (
        (put('base_model/conv2d_21/kernel', 3, 3, 32, 32), '1 unknown: base_model/conv2d_21/kernel'),
        (put('save_counter', dtype='int64'), '1 unknown: save_counter'),
        (put(conv, 3, 3, 4, 5), rf'1 of another shape: {conv} \(3, 3, 4, 5\) for \(3, 3, 4, 4\)'),
        (put('head_contrastive/nl_0/dense/kernel', 31, 32), r'\(31, 32\) for \(32, 32\)'),
        (put('base_model/conv2d/kernel', 4), r'has shape \(4,\), where 4 dimensions'),
        (as_float64, '1 not float32'),
        (without_two, f'2 missing: {beta}, {conv}')):
        with pytest.raises(BadCheckpoint, match=words): load_official(write(tmp_path, change))

def test_selective_kernels_are_recognized(tmp_path):
    "As in SimCLRv2: a stem of three 3 × 3 kernels, and in each block two streams and their mixing."
    def sk(t):
        put('base_model/conv2d/kernel', 3, 3, 3, 2)(t)
        put('base_model/conv2d_1/kernel', 3, 3, 2, 2)(t)
    with pytest.raises(BadCheckpoint, match='SimCLRv2 network with selective kernels'):
        load_official(write(tmp_path, sk))

@pytest.mark.parametrize('head, words', [
    (tb.header(big_endian=1), 'big-endian'), (tb.header(min_consumer=2), 'newer than version 1')])
def test_headers_that_are_refused(tmp_path, head, words):
    with pytest.raises(BadCheckpoint, match=words): load_official(write(tmp_path, head=head))

def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def no(*args, **kwargs): raise AssertionError('unpickled')
    for place, name in ((pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler'), (torch, 'load'), (np, 'load')):
        monkeypatch.setattr(place, name, no)
    load_official(write(tmp_path))


# ---------------------------------------------------------------- damage

def corrupt(data, rng):
    "One random accident."
    at, n = rng.randrange(len(data)), rng.choice((1, 1, 2, 8, 100))
    kind = rng.choice(('flip', 'flip', 'flip', 'byte', 'cut', 'zeros', 'drop', 'insert', 'copy', 'noise'))
    if kind == 'flip': return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at+1:]
    if kind == 'byte': return data[:at] + bytes([rng.randrange(256)]) + data[at+1:]
    if kind == 'cut': return data[:at]
    if kind == 'zeros': return data[:at] + bytes(len(data[at:at+n])) + data[at+n:]
    if kind == 'drop': return data[:at] + data[at+n:]
    if kind == 'insert': return data[:at] + rng.randbytes(n) + data[at:]
    if kind == 'copy':
        other = rng.randrange(len(data))
        return data[:at] + data[other:other+n] + data[at+len(data[other:other+n]):]
    return data[:at] + rng.randbytes(len(data[at:at+n])) + data[at+n:]

def test_500_random_corruptions(tmp_path):
    "An error with words, or the same tensors; never a crash, a hang, or a wrong tensor."
    prefix, rng = write(tmp_path, shards=2, block_size=1000), random.Random(0)
    good, outcomes = state(load_official(prefix)), {'refused': 0, 'equal': 0}
    files = [Path(f'{prefix}{s}') for s in ('.index', '.data-00000-of-00002', '.data-00001-of-00002')]
    for i in range(500):
        file = files[rng.choice((0, 0, 1, 2))]
        whole = file.read_bytes()
        file.write_bytes(corrupt(whole, rng))
        with within(20):
            try: got = state(load_official(prefix))
            except BadCheckpoint as e:
                assert len(str(e)) > 20
                outcomes['refused'] += 1
            else:
                assert equal(got, good), f'wrong tensors at corruption {i} of {file.name}'
                outcomes['equal'] += 1
        file.write_bytes(whole)
    assert outcomes['refused'] > 400, outcomes
    assert equal(state(load_official(prefix)), good)

def seal(data, kind=b'\0'):
    "A block, its kind of compression, and a valid checksum."
    return data + kind + struct.pack('<I', tb.masked(tb.crc32c(data + kind)))

def footer(offset, where):
    "The last 48 bytes of an index, with the place of the block that lists the blocks."
    handles = tb.varint(0)*2 + tb.varint(offset) + tb.varint(len(where))
    return handles.ljust(40, b'\0') + struct.pack('<Q', tb.MAGIC)

def test_500_corruptions_under_valid_checksums(tmp_path):
    "The parser itself: the entries of the index are damaged and sealed again, so that no checksum tells."
    prefix, rng = write(tmp_path), random.Random(1)
    index = Path(f'{prefix}.index')
    entries, refused = list(read_table(index.read_bytes()).items()), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(250):
        changed, i = list(entries), rng.randrange(len(entries))
        name, value = changed[i]
        if name and rng.random() < .3: changed[i] = corrupt(name, rng), value
        else: changed[i] = name, corrupt(value, rng)
        index.write_bytes(tb.table(sorted(changed)))
        with within(20):
            try: load_official(prefix)
            except (BadCheckpoint, FileNotFoundError): refused += 1
    for _ in range(250): # the bytes of a block, lengths and all
        data = corrupt(tb.block(entries, 16), rng)
        where = tb.block([(b'z', tb.varint(0) + tb.varint(len(data)))], 1)
        index.write_bytes(seal(data) + seal(where) + footer(len(data) + 5, where))
        with within(20):
            try: load_official(prefix)
            except (BadCheckpoint, FileNotFoundError): refused += 1
    assert refused > 350
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000 # kB

def replace(prefix, name, value):
    "Write another value for a name into an index."
    index = Path(f'{prefix}.index')
    table = read_table(index.read_bytes()) | {name.encode(): value}
    index.write_bytes(tb.table(sorted(table.items())))

@pytest.mark.parametrize('value, words', [
    (tb.entry(1, (2**40,), 0, 0, 2**42, 0), 'cut off'),
    (tb.entry(1, (2**62, 4), 0, 0, 16, 0), 'cannot have 16 bytes'),
    (tb.entry(1, (4,), 7, 0, 16, 0), 'is missing: a checkpoint is its index and its data'),
    (tb.entry(1, (4,), 0, 2**63, 16, 0), 'cut off'),
    (tb.entry(1, (4,), 0, 0, 16, 0) + tb.field(7, b'\x0a\x00'), 'slices'),
    (tb.field(1, 1) + tb.field(2, 5), 'wrong kind'),
    (b'\x0f', 'no field of kind 7'),
    (b'\x12\xff\xff\xff\xff\x0f', 'runs over its end'),
    (b'\x80'*12, 'more than ten bytes')])
def test_sizes_that_lie(tmp_path, value, words):
    "Nothing is allocated on the word of a number."
    prefix = write(tmp_path)
    replace(prefix, 'base_model/batch_normalization/beta', value)
    with within(20), pytest.raises((BadCheckpoint, FileNotFoundError), match=words): load_official(prefix)

@pytest.mark.parametrize('name', ['base_model/conv2d/kernel', 'head_contrastive/nl_0/dense/kernel',
    'head_contrastive/nl_1/dense/kernel', 'head_supervised/linear_layer/dense/kernel'])
@pytest.mark.parametrize('size', [2**62, 2**63])
def test_sizes_that_lie_under_another_type(tmp_path, name, size):
    "Only of types with a known width can the size be checked; no other decides about the network."
    prefix = write(tmp_path)
    replace(prefix, name, tb.entry(7, small[name].shape[:-1] + (size,), 0, 0, 16, 0))
    with within(20), pytest.raises(BadCheckpoint, match=f'1 not float32: {name}'): load_official(prefix)

def test_tables_that_are_refused(tmp_path):
    def file(data, kind=b'\0', n=1):
        "An index with the same block n times."
        handles = [(bytes([97 + i]), tb.varint(0) + tb.varint(len(data))) for i in range(n)]
        where = tb.block(handles, 1)
        return seal(data, kind) + seal(where) + footer(len(seal(data, kind)), where)
    one = tb.block([(b'a', b'1'), (b'b', b'2')], 16)
    assert read_table(file(one)) == {b'a': b'1', b'b': b'2'}
    for data, words in (
        (file(one, b'\1'), 'compressed'), (file(one, n=2), 'not in order'),
        (file(tb.block([(b'b', b''), (b'a', b'')], 16)), 'not in order'),
        (file(tb.block([(b'a'*257, b'')], 16)), 'does not fit'), (file(b'\0\0\0'), 'too short'),
        (file(b'\xff'*8), 'wrong length'), (b'', 'cut off'), (b'x'*5000, 'cut off')):
        with pytest.raises(BadCheckpoint, match=words): read_table(data)
    (tmp_path/'huge.index').write_bytes(bytes(4_000_001))
    with pytest.raises(BadCheckpoint, match='4,000,001 bytes'): load_official(tmp_path/'huge')

def test_missing_data_file(tmp_path):
    prefix = write(tmp_path, shards=2)
    Path(f'{prefix}.data-00001-of-00002').unlink()
    with pytest.raises(FileNotFoundError, match='data-00001-of-00002 is missing'): load_official(prefix)


# ---------------------------------------------------------------- on to other programs

@pytest.mark.process
@torch.no_grad()
def test_convert_command(tmp_path):
    "`simclr convert PREFIX OUT`, then load_encoder: the same features, to the bit."
    prefix = write(tmp_path)
    program = [sys.executable, '-m', 'simclr_nb', 'convert']
    run = forks.run([*program, str(prefix), str(tmp_path/'out')], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    encoder, x = load_encoder(tmp_path/'out'/'encoder.safetensors'), torch.rand(3, 3, 32, 32)
    assert_close(encoder(x), load_official(prefix).encoder(x), rtol=0, atol=0)
    info = encoder.config
    assert info['preprocess'] == 'official' and info['license'] == 'apache-2.0' and 'model.ckpt-12345' in info['source']

@torch.no_grad()
def test_convert_to_timm_and_torchvision_files(tmp_path):
    "A ResNet-50 of full width, with a classifier; the other programs' own loaders take the file."
    import timm, torchvision
    from safetensors.torch import load_file
    encoder = build_encoder('resnet50', 64)
    save_encoder(encoder, tmp_path/'encoder.safetensors')
    files = convert(tmp_path/'encoder.safetensors', tmp_path/'timm', 'timm')
    net = timm.create_model('resnet50', num_classes=0, checkpoint_path=str(files[-1]))
    x = torch.rand(1, 3, 62, 62) # 31 cells before the pool: odd
    assert far(net.eval()(x), encoder.eval()(x)) < 1e-5
    files = convert(tmp_path/'encoder.safetensors', tmp_path/'torchvision', 'torchvision')
    net = torchvision.models.resnet50()
    net.fc = torch.nn.Identity()
    net.load_state_dict(load_file(files[-1]))
    assert far(net.eval()(x), encoder(x)) < 1e-5

@pytest.mark.parametrize('arch, size, channels', [
    ('resnet18_0.25x', 32, 3), ('resnet18_0.25x', 32, 4), ('resnet18_0.25x', 64, 3), ('resnet50_0.25x', 75, 3),
    ('timm:test_vit', 64, 3), ('timm:test_vit', 64, 1)])
@torch.no_grad()
def test_onnx_parity(tmp_path, arch, size, channels):
    for name in ('onnx', 'onnxscript'): pytest.importorskip(name, reason=f'ONNX export needs the package {name}')
    runtime = pytest.importorskip('onnxruntime', reason='parity needs the package onnxruntime')
    encoder = adapt_channels(build_encoder(arch, size), channels).eval()
    next(encoder.children()).train()
    modes = [m.training for m in encoder.modules()]
    export_onnx(encoder, tmp_path/'encoder.onnx')
    assert [m.training for m in encoder.modules()] == modes # each as it was
    encoder.eval()
    session = runtime.InferenceSession(tmp_path/'encoder.onnx')
    for n in (1, 2, 5):
        x = torch.rand(n, channels, size, size)
        assert far(torch.from_numpy(session.run(None, {'image': x.numpy()})[0]), encoder(x)) < 1e-5

@pytest.mark.parametrize('arch, size', [('resnet18_0.25x', 32), ('resnet50_0.25x', 64)])
@torch.no_grad()
def test_torch_export_parity(arch, size):
    encoder = build_encoder(arch, size).eval()
    example = torch.rand(2, 3, size, size)
    program = torch.export.export(encoder, (example,), dynamic_shapes=({0: torch.export.Dim('B')},)).module()
    for n in (1, 5):
        x = torch.rand(n, 3, size, size)
        assert_close(program(x), encoder(x))


# ---------------------------------------------------------------- numbers that are not finite, and a full disk

@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    def spoil(t):
        t['base_model/conv2d_1/kernel'] = t['base_model/conv2d_1/kernel'].copy()
        t['base_model/conv2d_1/kernel'][0, 0, 0, 0] = value
    with pytest.raises(BadCheckpoint, match='base_model/conv2d_1/kernel holds NaN or infinite numbers'):
        load_official(write(tmp_path, spoil))

@contextmanager
def full_after(size):
    "No file can grow beyond so many bytes, as on a disk that is nearly full."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)

def contents(folder): return {f.name: f.read_bytes() for f in folder.iterdir()} if folder.is_dir() else None

@pytest.mark.parametrize('to', [None, 'hub', 'onnx'])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, to):
    prefix, out = write(tmp_path), tmp_path/'out'
    for size in (1000, 150_000) if to == 'onnx' else (1000,):         # in the second the encoder has room
        with full_after(size), pytest.raises(OSError, match=f'nothing was written to {out}'): convert(prefix, out, to)
        assert contents(out) is None
    files = convert(prefix, out, to)
    before = contents(out)
    assert sorted(before) == sorted(f.name for f in files)
    with full_after(1000), pytest.raises(OSError, match='nothing was written'): convert(prefix, out, to, overwrite=True)
    assert contents(out) == before

def test_a_full_disk_leaves_the_onnx_file_as_it_was(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 7), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    encoder, file = Wrapped(net, 64, size=32), tmp_path/'new'/'encoder.onnx'
    with full_after(1000), pytest.raises(OSError, match='nothing was written to'): export_onnx(encoder, file)
    assert not file.parent.exists()
    assert export_onnx(encoder, file) == file and contents(file.parent).keys() == {'encoder.onnx'}
    before = contents(file.parent)
    with full_after(1000), pytest.raises(OSError): export_onnx(encoder, file)
    assert contents(file.parent) == before
