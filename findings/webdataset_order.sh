#!/usr/bin/env bash
# webdataset 1.0.2 (Python 3.11).
# In a tar shard whose labels lie behind all pictures (`tar cf x.tar *.jpg *.cls`), WebDataset finds
# twice as many samples, none with both: it puts together only members that follow one another.
# Seen: sorted by name: 2 samples, ['cls', 'jpg'] ['cls', 'jpg']
#       pictures first: 4 samples, ['jpg'] ['jpg'] ['cls'] ['cls']
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q webdataset==1.0.2
cd "$dir"
env/bin/python -W ignore - <<'PY' | tee seen
import io, tarfile, webdataset as wds
files = {'a.jpg': b'1', 'a.cls': b'0', 'b.jpg': b'2', 'b.cls': b'1'}
def samples(names):
    with tarfile.open('x.tar', 'w') as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    found = list(wds.WebDataset('x.tar', shardshuffle=False))
    return [sorted(k for k in s if not k.startswith('__')) for s in found]
for order, names in (('sorted by name', sorted(files)),
                     ('pictures first', sorted(files, key=lambda n: n[::-1]))):
    found = samples(names)
    print(f'{order}: {len(found)} samples,', *found)
PY
diff - seen <<'SEEN'
sorted by name: 2 samples, ['cls', 'jpg'] ['cls', 'jpg']
pictures first: 4 samples, ['jpg'] ['jpg'] ['cls'] ['cls']
SEEN
