// The numbers of runs as curves: which are drawn, over what, how smooth, and what they are where the reader points.
drl.curves = {
  defaults: {metric: '', x: 'epoch', smooth: '0', log: '', with: '', latest: '', apart: '1'},
  state: null,
  root: null,
  kept: new Map(),  // answers of the server, until the run goes on
  seen: '',         // the run and its length, as the answers were
  turn: 0,          // counts drawings, so that a late answer is not drawn over a newer one

  // Runs where the component of the page is made.
  follow(element, watch) {
    this.root = element;
    this.state = drl.begin('curves', this);
    element.addEventListener('input', event => this.changed(event.target));
    element.addEventListener('click', event => {
      const remove = event.target.closest('.remove'), run = event.target.closest('.chosen button');
      if (remove) this.toggle('metric', remove.closest('.chart').dataset.name);
      if (run) this.toggle('with', run.dataset.run);
    });
    element.addEventListener('pointermove', event => {
      const chart = event.target.closest('.chart');
      if (chart && event.target.closest('.chart > svg')) this.point(chart, event);
    });
    let width = 0;
    new ResizeObserver(() => {
      if (element.clientWidth === width) return;
      width = element.clientWidth;
      if (this.drawn) this.paint();
    }).observe(element);
    watch('value', () => this.draw());
    this.draw();
  },

  page() {
    return this.root && this.root.querySelector('.curves-page');
  },

  // Names in one word of an address.
  list(key) {
    return this.state[key].split(',').filter(Boolean).map(name => name.replaceAll('%2C', ',').replaceAll('%25', '%'));
  },

  set(key, value) {
    this.state[key] = value;
    drl.note({[key]: value === this.defaults[key] ? null : value});
    this.draw();
  },

  // Whether a box is ticked.
  on(key) {
    return this.state[key] === '1';
  },

  // A name more or less.
  toggle(key, name) {
    const now = key === 'metric' && !this.state.metric ? this.drawn.names : this.list(key);
    const then = now.includes(name) ? now.filter(other => other !== name) : [...now, name];
    this.set(key, then.map(name => name.replace(/[%,]/g, encodeURIComponent)).join(','));
  },

  changed(control) {
    if (control.closest('.read')) return this.read(control.closest('.chart'), +control.value);
    if (control.name === 'add' && control.value) this.toggle('metric', control.value);
    else if (control.name === 'with' && control.value) this.toggle('with', control.value);
    else if (control.type === 'checkbox') this.set(control.name, control.checked ? '1' : '0');
    else if (control.name in this.state) this.set(control.name, control.value);
  },

  // An answer of the server, asked for once.
  get(query) {
    const words = String(new URLSearchParams(query));
    if (!this.kept.has(words)) {
      this.kept.set(words, fetch('series?' + words).then(async answer => {
        if (!answer.ok) throw new Error(await answer.text());
        return answer.json();
      }));
    }
    return this.kept.get(words);
  },

  // Fetch what is asked for, and draw it.
  async draw() {
    const page = this.page();
    if (!page) return;
    const turn = ++this.turn, here = page.dataset.run, fresh = `${here} ${page.dataset.version}`;
    if (this.seen !== fresh) this.kept.clear();
    this.seen = fresh;
    try {
      const all = (await this.get({})).runs, latest = this.on('latest') ? all.slice(0, 1) : [];
      const runs = [...new Set([here, ...latest, ...this.list('with').filter(run => all.includes(run))])];
      const about = await Promise.all(runs.map(run => this.get({run})));
      const known = [...new Set(about.flatMap(a => Object.keys(a.names)))];
      const chosen = this.list('metric').filter(name => known.includes(name));
      const names = chosen.length || this.state.metric ? chosen : known.slice(0, 1);
      const x = this.state.x === 'epoch' || this.state.x === 'minutes' || known.includes(this.state.x) ? this.state.x : 'epoch';
      const over = {epoch: [], minutes: ['seconds']}[x] || [x];
      const values = await Promise.all(runs.map(async run => {
        const wanted = [...names, ...over];
        const found = await Promise.all(wanted.map(name => this.get({run, name})));
        return Object.fromEntries(wanted.map((name, i) => [name, found[i]]));
      }));
      if (turn !== this.turn) return;
      this.drawn = {all, runs, about, known, names, x, values};
      this.paint();
      this.page().querySelector('.trouble').textContent = '';
    } catch (error) {
      this.kept.clear();
      if (turn === this.turn) this.page().querySelector('.trouble').textContent = `This could not be drawn: ${error.message}`;
    }
  },

  // All that was fetched, onto the page.
  paint() {
    const page = this.page();
    if (!page || !page.offsetParent) return;
    this.controls(page);
    const place = page.querySelector('.charts'), template = page.querySelector('template').content.firstElementChild;
    const there = new Map([...place.children].map(chart => [chart.dataset.key, chart]));
    const wanted = this.drawn.names.flatMap(name => this.parts(name));
    const charts = wanted.map(({key}) => there.get(key) || template.cloneNode(true));
    if (charts.some((chart, i) => chart !== place.children[i]) || charts.length !== place.children.length) place.replaceChildren(...charts);
    charts.forEach((chart, i) => this.chart(chart, wanted[i]));
    this.differences(page);
  },

  // The charts of a number: one, or one for each task, whose numbers may be of another size.
  parts(name) {
    const tasks = [...new Set(this.drawn.values.flatMap(v => Object.keys(v[name])))];
    if (!this.on('apart') || tasks.length < 2) return [{name, task: null, key: name}];
    return tasks.map(task => ({name, task, key: `${name} of ${task || 'the whole epoch'}`}));
  },

  controls(page) {
    const {all, runs, known} = this.drawn, tool = name => page.querySelector(`.tools [name=${name}]`);
    const options = (select, names) => {
      const first = select.options[0], there = [...select.options].slice(1).map(option => option.value);
      if (String(there) !== String(names)) select.replaceChildren(first, ...names.map(name => new Option(name, name)));
    };
    options(tool('add'), known.filter(name => !this.drawn.names.includes(name)));
    options(tool('with'), all.filter(run => !runs.includes(run)));
    tool('add').value = tool('with').value = '';
    const over = tool('x'), missing = known.filter(name => ![...over.options].some(option => option.value === name));
    over.append(...missing.map(name => new Option(name, name)));
    over.value = this.drawn.x;
    tool('smooth').value = this.state.smooth;
    tool('smooth').parentElement.querySelector('output').textContent = +this.state.smooth ? this.state.smooth : 'none';
    for (const name of ['log', 'latest', 'apart']) tool(name).checked = this.on(name);
    page.querySelector('.chosen').replaceChildren(...(runs.length < 2 ? [] : runs).map((run, i) => {
      const item = document.createElement('li'), fixed = !this.list('with').includes(run);
      const chip = document.createElement(fixed ? 'span' : 'button');
      chip.textContent = fixed ? run : `${run} ✕`;
      if (!fixed) Object.assign(chip, {type: 'button', ariaLabel: `${run}: draw it no more`}).dataset.run = run;
      chip.style.setProperty('--of', `var(--c${i % 8})`);
      item.append(chip);
      return item;
    }));
  },

  // The lines of a chart: {run, task, colour, dash, points: [{epoch, x, y}]}.
  lines(name, only) {
    const {runs, values, x} = this.drawn, found = [];
    const tasks = [...new Set(values.flatMap(v => Object.keys(v[name])))];
    runs.forEach((run, r) => {
      const across = this.across(values[r], x);
      for (const [task, pairs] of Object.entries(values[r][name])) {
        if (only !== null && task !== only) continue;
        const t = only === null ? tasks.indexOf(task) : 0;
        const points = pairs.map(([epoch, y]) => ({epoch, x: across(task, epoch), y}));
        found.push({
          run, task,
          colour: `var(--c${(runs.length > 1 ? r : t) % 8})`,
          dash: runs.length > 1 ? ['', '7 4', '2 4', '9 3 2 3'][t % 4] : '',
          points: points.filter(p => p.x !== undefined && (!this.on('log') || p.y > 0)),
        });
      }
    });
    return found.filter(line => line.points.length);
  },

  // Where an epoch of a task lies on the lower axis.
  across(values, x) {
    if (x === 'epoch') return (task, epoch) => epoch;
    const maps = Object.fromEntries(Object.entries(values[x === 'minutes' ? 'seconds' : x]).map(([task, pairs]) => [task, new Map(pairs)]));
    if (x !== 'minutes') return (task, epoch) => (maps[task] || maps[''] || new Map()).get(epoch);
    let sum = 0;
    const ends = new Map([...(maps[''] || [])].map(([epoch, seconds]) => [epoch, (sum += seconds) / 60]));
    return (task, epoch) => ends.get(epoch);
  },

  // Exponential moving average, without the bias of its start.
  smoothed(points) {
    const keep = Math.min(0.99, +this.state.smooth || 0);
    let mean = 0, weight = 1;
    return points.map(p => {
      mean = keep * mean + (1 - keep) * p.y;
      weight *= keep;
      return {...p, y: mean / (1 - weight)};
    });
  },

  ticks(low, high, most) {
    const step = 10 ** Math.floor(Math.log10((high - low) / most));
    const size = [1, 2, 5, 10].map(k => k * step).find(s => (high - low) / s <= most) || step * 10;
    const found = [];
    for (let t = Math.ceil(low / size - 1e-9) * size; t <= high + size * 1e-9; t += size) found.push(Math.abs(t) < size * 1e-9 ? 0 : t);
    return found;
  },

  words(value) {
    if (value === undefined || !Number.isFinite(value)) return '–';
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(2).replace('-', '−');
    return String(+value.toPrecision(4)).replace('-', '−');
  },

  svg(kind, attributes, text) {
    const made = document.createElementNS('http://www.w3.org/2000/svg', kind);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  },

  // One chart.
  chart(figure, {name, task, key}) {
    const {runs, about, x} = this.drawn, svg = figure.querySelector(':scope > svg');
    const width = Math.max(240, svg.clientWidth), height = svg.clientHeight || 260;
    const raw = this.lines(name, task), lines = raw.map(line => ({...line, points: this.smoothed(line.points)}));
    const box = {left: 58, right: width - 14, top: 12, bottom: height - 40};
    const xs = raw.flatMap(l => l.points.map(p => p.x)), ys = raw.flatMap(l => l.points.map(p => p.y));
    const log = this.on('log'), scale = log ? Math.log10 : v => v;
    const range = values => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    let [x0, x1] = range(xs), [y0, y1] = range(ys.map(scale));
    if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
    if (y0 === y1) [y0, y1] = [y0 - (log ? 0.5 : Math.abs(y0) / 2 || 0.5), y1 + (log ? 0.5 : Math.abs(y1) / 2 || 0.5)];
    const pad = (y1 - y0) * 0.05;
    const px = v => box.left + (box.right - box.left) * (v - x0) / (x1 - x0);
    const py = v => box.bottom - (box.bottom - box.top) * (scale(v) - y0 + pad) / (y1 - y0 + 2 * pad);
    const path = points => points.map((p, i) => `${i ? 'L' : 'M'}${px(p.x).toFixed(1)},${py(p.y).toFixed(1)}`).join('');
    const parts = [], title = `${key}, over ${x === 'epoch' ? 'epochs' : x}`;
    if (raw.length) {
      for (const t of this.ticks(y0, y1, 5)) {
        const y = py(log ? 10 ** t : t).toFixed(1);
        parts.push(this.svg('line', {class: 'grid', x1: box.left, x2: box.right, y1: y, y2: y}));
        parts.push(this.svg('text', {x: box.left - 6, y: +y + 4, 'text-anchor': 'end'}, this.words(log ? 10 ** t : t)));
      }
      for (const t of this.ticks(x0, x1, width < 420 ? 4 : 8)) {
        parts.push(this.svg('text', {x: px(t).toFixed(1), y: box.bottom + 17, 'text-anchor': 'middle'}, this.words(t)));
      }
    }
    parts.push(this.svg('line', {class: 'grid', x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom}));
    parts.push(this.svg('text', {x: (box.left + box.right) / 2, y: height - 5, 'text-anchor': 'middle'}, {epoch: 'epoch', minutes: 'minutes of training'}[x] || x));
    const place = this.across(this.drawn.values[0], x), mark = epoch => x === 'epoch' ? epoch : x === 'minutes' ? place('', epoch) : undefined;
    const best = about[0].best && mark(about[0].best.epoch), watched = about[0].watched.map(mark).filter(v => v !== undefined);
    if (best !== null && best !== undefined && best >= x0 && best <= x1) parts.push(this.svg('line', {class: 'best', x1: px(best), x2: px(best), y1: box.top, y2: box.bottom}));
    for (const at of watched) parts.push(this.svg('path', {class: 'watched', d: `M${px(at)},${box.bottom - 7}l4,7h-8z`}));
    for (const line of raw) if (+this.state.smooth) parts.push(this.svg('path', {class: 'raw', d: path(line.points), style: `--of:${line.colour}`}));
    for (const line of lines) parts.push(this.svg('path', {class: 'line', d: path(line.points), style: `--of:${line.colour}`, 'stroke-dasharray': line.dash}));
    const cursor = this.svg('g', {});
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    svg.replaceChildren(...parts, cursor);
    Object.assign(figure.dataset, {name, key});
    figure.querySelector('h2').textContent = key;
    figure.querySelector('.remove').setAttribute('aria-label', `Remove ${name}`);
    svg.setAttribute('aria-label', `${title}: ${lines.map(l => `${this.label(l)} from ${this.words(l.points[0].y)} to ${this.words(l.points.at(-1).y)}`).join('; ')}`);
    const said = [];
    if (about[0].best) said.push(`Dashed: the best of ${about[0].best.by}, epoch ${about[0].best.epoch}`);
    if (about[0].watched.length) said.push('▲ held-out rewards were looked at');
    if (runs.length > 1 && said.length) said.push(`both of ${runs[0]}`);
    figure.querySelector('figcaption').textContent = raw.length ? said.join(' · ') : 'Nothing here can be drawn on these axes.';
    const epochs = [...new Set(raw.flatMap(l => l.points.map(p => p.epoch)))].sort((a, b) => a - b);
    figure.plot = {lines, cursor, px, py, box, epochs, x};
    const slider = figure.querySelector('.read input'), before = slider.dataset.epoch;
    slider.max = Math.max(0, epochs.length - 1);
    slider.setAttribute('aria-label', `Read ${key} at an epoch`);
    this.read(figure, before === undefined ? epochs.length - 1 : Math.max(0, epochs.findLastIndex(e => e <= before)), before === undefined);
  },

  label(line) {
    return [this.drawn.runs.length > 1 ? line.run : '', line.task].filter(Boolean).join(' · ') || 'whole epoch';
  },

  // The values at one epoch: on the chart, below it, and in the key.
  read(figure, index, atEnd) {
    const {lines, cursor, px, py, box, epochs, x} = figure.plot, epoch = epochs[index];
    const slider = figure.querySelector('.read input');
    slider.value = index;
    if (atEnd || index === epochs.length - 1) delete slider.dataset.epoch;
    else slider.dataset.epoch = epoch;
    figure.querySelector('.read output').textContent = epoch === undefined ? '' : `epoch ${epoch}`;
    slider.setAttribute('aria-valuetext', `epoch ${epoch}`);
    const at = lines.map(line => line.points.findLast(p => p.epoch <= epoch) || line.points[0]);
    const parts = x === 'epoch' && epoch !== undefined ? [this.svg('line', {class: 'cursor', x1: px(epoch), x2: px(epoch), y1: box.top, y2: box.bottom})] : [];
    lines.forEach((line, i) => parts.push(this.svg('circle', {class: 'dot', r: 4, cx: px(at[i].x), cy: py(at[i].y), style: `--of:${line.colour}`})));
    cursor.replaceChildren(...parts);
    figure.querySelector('.key-list').replaceChildren(...lines.map((line, i) => {
      const item = document.createElement('li'), words = document.createElement('span'), value = document.createElement('b');
      const sample = this.svg('svg', {viewBox: '0 0 26 10', 'aria-hidden': 'true'});
      sample.append(this.svg('path', {class: 'line', d: 'M0,5H26', style: `--of:${line.colour}`, 'stroke-dasharray': line.dash}));
      words.textContent = this.label(line);
      value.textContent = this.words(at[i].y);
      item.append(sample, words, value);
      return item;
    }));
  },

  // The epoch under the pointer.
  point(figure, event) {
    const plot = figure.plot, svg = figure.querySelector(':scope > svg'), frame = svg.getBoundingClientRect();
    if (!plot || !plot.epochs.length) return;
    const scale = svg.viewBox.baseVal.width / frame.width;
    const x = (event.clientX - frame.left) * scale, y = (event.clientY - frame.top) * scale;
    let best = null, nearest = Infinity;
    for (const line of plot.lines) {
      for (const p of line.points) {
        const far = (plot.px(p.x) - x) ** 2 + (plot.x === 'epoch' ? 0 : (plot.py(p.y) - y) ** 2);
        if (far < nearest) [best, nearest] = [p.epoch, far];
      }
    }
    this.read(figure, plot.epochs.indexOf(best));
  },

  // A row for each setting that is not the same in all runs that have it.
  differences(page) {
    const {runs, about} = this.drawn, section = page.querySelector('.differences');
    section.hidden = runs.length < 2;
    if (runs.length < 2) return;
    const values = key => about.filter(a => key in a.config).map(a => JSON.stringify(a.config[key]));
    const keys = [...new Set(about.flatMap(a => Object.keys(a.config)))].filter(key => new Set(values(key)).size > 1);
    const row = (cells, kind) => {
      const made = document.createElement('tr');
      cells.forEach((text, i) => {
        const cell = document.createElement(i && kind === 'td' ? 'td' : 'th');
        if (cell.tagName === 'TH') cell.scope = kind === 'th' ? 'col' : 'row';
        cell.textContent = text;
        made.append(cell);
      });
      return made;
    };
    const shown = value => value === undefined || value === null ? 'not set' : value === '' ? 'default' : String(value);
    const rows = keys.map(key => row([key, ...about.map(a => shown(a.config[key]))], 'td'));
    if (!rows.length) rows.push(row(['nothing', ...runs.map(() => 'the same')], 'td'));
    section.querySelector('table').replaceChildren(row(['setting', ...runs], 'th'), ...rows);
  },
};
