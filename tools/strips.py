"""Draws nbs/images/strips/PAGE.svg: the whole method as boxes, with the box of one page filled.

The page begins with its strip. `--check` only says which files are out of step.
"""
import sys
from pathlib import Path

folder = Path(__file__).resolve().parents[1]/'nbs'/'images'/'strips'
blue, light, line = '#1f77b4', '#f3f5f7', '#8a949e'

# The upper row is one training step, from a file to the update of the weights; the lower, what is built around it.
step = [('datasets', 'Data'), ('augmentations', '1 Views'), ('encoder', '2 Encoder f'), ('projection', '3 Head g'),
        ('ntxent', '4 NT-Xent'), ('lars', '5 LARS')]
around = [[('distributed', '6 Processes'), ('learner', '7 Learner')],
          [('extract', 'Features'), ('linear', 'Linear'), ('finetune', 'Few labels'), ('transfer', 'Transfer')],
          [('official', 'Weights'), ('main', 'Commands')]]

def box(x, y, width, page, label, here):
    fill, ink, weight = (blue, '#fff', 600) if page == here else (light, '#39424a', 400)
    return (f'<rect x="{x}" y="{y}" width="{width}" height="28" rx="6" fill="{fill}"/>'
            f'<text x="{x + width/2:g}" y="{y + 18.5}" text-anchor="middle" fill="{ink}" font-weight="{weight}">'
            f'{label}</text>')

def arrow(x1, y1, x2, y2, letter=''):
    path = f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{line}" stroke-width="1.4" marker-end="url(#a)"/>'
    if not letter: return path
    return path + f'<text x="{(x1 + x2)/2 - 2:g}" y="{y1 - 5}" text-anchor="middle" font-style="italic">{letter}</text>'

def strip(here):
    "The picture as SVG, with the box of one page filled."
    width, gap, parts = 112, 37.6, []
    for i, (page, label) in enumerate(step):
        x = i*(width + gap)
        parts.append(box(round(x, 1), 4, width, page, label, here))
        letter = {2: 'h', 3: 'z'}.get(i, '')
        if i < 5: parts.append(arrow(round(x + width + 4, 1), 18, round(x + width + gap - 6, 1), 18, letter))
    x, width = 0, 101
    for group in around:
        for page, label in group:
            parts.append(box(round(x, 1), 58, width, page, label, here))
            x += width + 4
        x += 9
    parts.append(arrow(round(2*149.6 + 112 + 18, 1), 26, round(2*149.6 + 112 + 18, 1), 52))     # h is what is graded
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 90" width="860" height="90" '
            'font-family="system-ui, sans-serif" font-size="13.5">'
            f'<defs><marker id="a" markerWidth="7" markerHeight="7" refX="5" refY="3.5" orient="auto">'
            f'<path d="M0 .5L6 3.5L0 6.5z" fill="{line}"/></marker></defs>{"".join(parts)}</svg>\n')

def main(check=False):
    wanted = {folder/f'{page}.svg': strip(page) for group in (step, *around) for page, _ in group}
    stale = [file for file, svg in wanted.items() if not file.exists() or file.read_text(encoding='utf-8') != svg]
    if check: return [f'{file.name} is out of step: run python tools/strips.py' for file in stale]
    folder.mkdir(parents=True, exist_ok=True)
    for file in stale: file.write_text(wanted[file], encoding='utf-8')
    return []

if __name__ == '__main__':
    problems = main('--check' in sys.argv)
    print('\n'.join(problems))
    sys.exit(bool(problems))
