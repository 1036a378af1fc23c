// Injected into a page by browser.py: findings about its layout, in sentences.

// Texts, boxes and pictures below the elements that `roots` selects. A text is visible if no ancestor hides it; if an
// ancestor scrolls, it can be reached.
const pgolfLook = (roots, width) => {
  const found = [];
  const name = e => {
    const cell = e.closest('.jp-Notebook-cell');
    const cells = [...document.querySelectorAll('.jp-Notebook-cell')];
    const words = (e.alt || e.textContent || '').trim().replace(/\s+/g, ' ').slice(0, 50);
    return (cell ? `cell ${cells.indexOf(cell)}: ` : '') + `<${e.tagName.toLowerCase()}>` + (words && ` '${words}'`);
  };
  const chain = e => {
    const up = [];
    for (; e && e !== document.documentElement; e = e.parentElement) up.push(e);
    return up;
  };
  const scrolls = s => s.overflowX === 'auto' || s.overflowX === 'scroll';
  const shown = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
  // The part of a box that is seen, and whether some of it is cut off where nobody can scroll to it.
  const seen = (box, e) => {
    let {left, right, top, bottom} = box, cut = false;
    for (const a of chain(e)) {
      const style = getComputedStyle(a);
      if (a === document.body || style.overflowX === 'visible') continue;
      const edge = a.getBoundingClientRect();
      if (!scrolls(style)) cut ||= right > edge.right + 1.5 || left < edge.left - 1.5;
      else cut ||= left < edge.left - a.scrollLeft - 1.5;
      left = Math.max(left, edge.left); right = Math.min(right, edge.right);
      top = Math.max(top, edge.top); bottom = Math.min(bottom, edge.bottom);
    }
    return {left, right, top, bottom, cut};
  };

  const texts = [];
  for (const root of document.querySelectorAll(roots)) {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let node; node = walker.nextNode(); ) {
      const e = node.parentElement;
      if (!node.data.trim() || /^(SCRIPT|STYLE|TITLE)$/.test(e.tagName) || !shown(e)) continue;
      const floats = chain(e).some(a => /sticky|fixed/.test(getComputedStyle(a).position));
      const range = document.createRange();
      range.selectNodeContents(node);
      let cut = false, outside = false, lines = 0, widest = 0;
      for (const box of range.getClientRects()) {
        if (box.width < 2 || box.height < 2) continue;
        lines += 1;
        widest = Math.max(widest, box.width);
        const part = seen(box, e);
        cut ||= part.cut;
        outside ||= part.right > width + 1.5 || part.left < -1.5;
        if (!floats && part.right - part.left > 2 && part.bottom - part.top > 2) texts.push({...part, e});
      }
      if (cut) found.push(`${name(e)}: text is cut off at the side and cannot be scrolled to`);
      else if (outside) found.push(`${name(e)}: text lies beyond the window`);
      if (lines > 4 && widest < 60) found.push(`${name(e)}: text is squeezed into ${lines} lines of a few letters`);
    }
  }

  texts.sort((a, b) => a.top - b.top);
  const pairs = new Set();
  for (let i = 0; i < texts.length; i++) {
    for (let j = i + 1; j < texts.length && texts[j].top < texts[i].bottom; j++) {
      const [a, b] = [texts[i], texts[j]];
      if (a.e === b.e) continue;
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 3 && high > 0.3 * Math.min(a.bottom - a.top, b.bottom - b.top))
        pairs.add(`${name(a.e)} and ${name(b.e)}: texts overlap`);
    }
  }
  found.push(...pairs);

  const images = [...document.querySelectorAll(roots)].flatMap(root => [...root.querySelectorAll('img')]);
  for (const image of images) {
    const box = image.getBoundingClientRect();
    const area = (image.closest('.jp-OutputArea-output') || document.body).getBoundingClientRect();
    let wrong = '';
    if (!image.complete || !image.naturalWidth) wrong = `${image.src.slice(0, 80)} did not load`;
    else if (!shown(image) || !box.width || !box.height) wrong = 'is not visible';
    else if (box.right > area.right + 1 || box.left < area.left - 1) wrong = 'is wider than its place';
    if (wrong) found.push(`${name(image)}: the picture ${wrong}`);
  }

  const areas = [...document.querySelectorAll('.jp-OutputArea-child, .jp-RenderedMarkdown')].filter(shown);
  for (const [i, a] of areas.slice(0, -1).entries()) {
    const [one, two] = [a.getBoundingClientRect(), areas[i + 1].getBoundingClientRect()];
    const wide = Math.min(one.right, two.right) - Math.max(one.left, two.left);
    const high = Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top);
    if (wide > 2 && high > 2 && !a.contains(areas[i + 1]))
      found.push(`${name(a)} and ${name(areas[i + 1])}: outputs overlap`);
  }
  return found;
};

// For a report page: elements wider than the window and in no box that scrolls, links, ids, number of figures.
const pgolfPage = width => {
  const free = e => { for (let a = e.parentElement; a && a !== document.body; a = a.parentElement)
    if (getComputedStyle(a).overflowX !== 'visible') return false; return true; };
  const wide = [...document.body.querySelectorAll('*')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > width + 1.5 || box.left < -1.5) && e.checkVisibility() && free(e); });
  const inner = wide.filter(e => !wide.some(other => other !== e && e.contains(other)));
  return {
    wide: inner.map(e => `<${e.tagName.toLowerCase()}> '${e.textContent.trim().slice(0, 50)}': wider than the page, ` +
      `to ${Math.round(e.getBoundingClientRect().right)} of ${width} pixels`),
    links: [...document.querySelectorAll('a[href]')].map(a => [a.getAttribute('href'), a.href]),
    ids: [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name),
    figures: document.images.length,
  };
};

const pgolfPrompts = () =>
  [...document.querySelectorAll('.jp-CodeCell')].map(c => c.querySelector('.jp-InputPrompt').textContent);
const pgolfStatus = () => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status;
// Tracebacks and warnings among the outputs.
const pgolfErrors = () => [...document.querySelectorAll('.jp-Notebook-cell')].flatMap((cell, i) =>
  [...cell.querySelectorAll('.jp-OutputArea-output')]
    .filter(o => /error|stderr/.test(o.dataset.mimeType))
    .map(o => o.textContent.trim().split('\n'))
    .flatMap(lines => lines.some(line => line.includes('Traceback'))
      ? [`cell ${i}: an error: ${lines.at(-1).slice(0, 200)}`]
      : lines.filter(line => /warning/i.test(line)).slice(0, 1)
          .map(line => `cell ${i}: a warning is shown: ${line.trim().slice(0, 200)}`)));
