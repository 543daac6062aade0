// Sorts tables, reads values from drawings, and turns pages of attention maps. Everything is on the page without it.
'use strict';

const all = (within, selector) => [...within.querySelectorAll(selector)];
const svg = (name, attributes) => {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

// Tables: a heading becomes a button that sorts ascending, then descending, then as it was. Empty cells stay last.

const compare = (a, b) => {
  if (!a.text || !b.text) return 0;
  const numbers = a.number !== undefined && b.number !== undefined;
  return numbers ? a.number - b.number : a.text.localeCompare(b.text, 'en', { numeric: true });
};

function columnsOf(head) {
  const taken = []; // by row, whether a cell from above reaches down
  const columns = new Map();
  [...head.rows].forEach((row, y) => {
    let x = 0;
    for (const cell of row.cells) {
      while (taken[y]?.[x]) x++;
      columns.set(cell, x);
      for (let down = 0; down < cell.rowSpan; down++)
        for (let right = 0; right < cell.colSpan; right++) (taken[y + down] ??= [])[x + right] = true;
      x += cell.colSpan;
    }
  });
  return columns;
}

function makeSortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const columns = columnsOf(table.tHead);
  for (const heading of all(table.tHead, '[data-sort]')) {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener('click', () => {
      const before = heading.getAttribute('aria-sort');
      const next = { ascending: 'descending', descending: null }[before] ?? (before ? null : 'ascending');
      for (const each of all(table.tHead, '[aria-sort]')) each.removeAttribute('aria-sort');
      if (next) heading.setAttribute('aria-sort', next);
      const sign = next === 'descending' ? -1 : 1;
      const keyed = original.map((row) => {
        const cell = row.cells[columns.get(heading)];
        const number = 'value' in cell.dataset ? Number(cell.dataset.value) : undefined;
        return { row, number, text: cell.textContent.trim() };
      });
      if (next) keyed.sort((a, b) => !a.text - !b.text || sign * compare(a, b));
      body.append(...keyed.map(({ row }) => row));
    });
  }
}

// Drawings: values at the position that is nearest to the pointer, or that the arrow keys choose.

function makeReadable(chart) {
  const positions = JSON.parse(chart.dataset.x); // [percent, key, text]
  const keys = all(chart, '.legend button');
  const points = keys.map((key) => JSON.parse(key.dataset.points));
  const last = keys.map((key) => key.querySelector('.value').textContent);
  const output = chart.querySelector('.at output');
  const atRest = output.textContent;
  const lines = (index) => all(chart, `.line[data-line="${index}"]`);
  let chosen = null;

  const show = (index) => {
    chosen = index;
    for (const mark of all(chart, '.mark')) mark.remove();
    const position = positions[index];
    output.textContent = position ? `${chart.dataset.name} ${position[2]}` : atRest;
    keys.forEach((key, line) => {
      key.querySelector('.value').textContent = position ? (points[line][position[1]] ?? '–') : last[line];
    });
    if (!position) return;
    for (const drawing of all(chart, '.drawing')) {
      const guide = { class: 'mark guide', x1: `${position[0]}%`, x2: `${position[0]}%`, y2: '100%' };
      drawing.prepend(svg('line', guide));
      for (const line of all(drawing, '.line:not([hidden])')) {
        const place = Object.keys(points[line.dataset.line]).indexOf(position[1]);
        if (place < 0) continue;
        const y = JSON.parse(line.dataset.y)[place];
        line.append(svg('circle', { class: 'mark', cx: `${position[0]}%`, cy: `${y}%`, r: 5 }));
      }
    }
  };

  const follow = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const across = (100 * (event.clientX - box.left)) / box.width;
    const distances = positions.map(([x]) => Math.abs(x - across));
    show(distances.indexOf(Math.min(...distances)));
  };

  for (const drawing of all(chart, '.drawing')) {
    drawing.setAttribute('tabindex', '0');
    drawing.addEventListener('pointermove', follow);
    drawing.addEventListener('pointerdown', follow);
    drawing.addEventListener('pointerleave', (event) => event.pointerType === 'mouse' && show(null));
    drawing.addEventListener('blur', () => show(null));
    drawing.addEventListener('keydown', (event) => {
      const end = positions.length - 1;
      const next = { ArrowLeft: (chosen ?? end + 1) - 1, ArrowRight: (chosen ?? -1) + 1, Home: 0, End: end }[event.key];
      if (event.key === 'Escape') show(null);
      if (next === undefined) return;
      event.preventDefault();
      show(Math.max(0, Math.min(end, next)));
    });
  }

  const emphasise = (index) => {
    for (const line of all(chart, '.line')) line.classList.toggle('faint', index !== null && line.dataset.line !== index);
  };
  keys.forEach((key, index) => {
    key.addEventListener('click', () => {
      const hidden = key.getAttribute('aria-pressed') === 'true';
      key.setAttribute('aria-pressed', String(!hidden));
      for (const line of lines(index)) line.toggleAttribute('hidden', hidden);
    });
    for (const event of ['pointerenter', 'focus']) key.addEventListener(event, () => emphasise(String(index)));
    for (const event of ['pointerleave', 'blur']) key.addEventListener(event, () => emphasise(null));
  });

  const scales = all(chart, '.scales button');
  for (const scale of scales) {
    scale.addEventListener('click', () => {
      for (const each of scales) each.setAttribute('aria-pressed', String(each === scale));
      for (const plot of all(chart, '.plot')) plot.hidden = plot.dataset.scale !== scale.dataset.scale;
    });
  }
}

// Attention maps: sliders choose the layer and the head.

function makeViewer(viewer) {
  const sliders = all(viewer, 'input[type=range]');
  const update = () => {
    const chosen = {};
    for (const slider of sliders) {
      const value = slider.dataset.values.split(' ')[slider.value];
      chosen[slider.dataset.choice] = value;
      slider.setAttribute('aria-valuetext', `${slider.dataset.choice} ${value}`);
      slider.previousElementSibling.textContent = value;
    }
    for (const map of all(viewer, '.map'))
      map.classList.toggle('chosen', map.dataset.layer === chosen.layer && map.dataset.head === chosen.head);
  };
  for (const slider of sliders) {
    slider.addEventListener('input', update);
    slider.closest('label').hidden = slider.max === '0';
  }
  viewer.querySelector('.sliders').hidden = false;
  update();
}

document.documentElement.classList.add('script');
all(document, 'table').forEach(makeSortable);
all(document, '.chart').forEach(makeReadable);
all(document, '.viewer').forEach(makeViewer);
