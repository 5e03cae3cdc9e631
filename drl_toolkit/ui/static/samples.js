// The samples of an epoch: which are shown, and in which order.
drl.samples = {
  defaults: {task: '', sort: 'best', find: '', only: 'all', class: '', bar: ''},  // bar: which bin of the histogram
  state: null,
  root: null,

  // Runs where the component of the page is made.
  follow(element, watch) {
    this.root = element;
    this.state = drl.begin('samples', this);
    element.addEventListener('input', event => this.set(event.target.name, event.target.value));
    element.addEventListener('click', event => {
      const bar = event.target.closest('.bars button'), copy = event.target.closest('.copy');
      if (bar) this.choose(bar);
      if (copy) this.copy(copy);
    });
    watch('value', () => this.draw());
    this.draw();
  },

  set(key, value) {
    if (!(key in this.state)) return;
    this.state[key] = value;
    if (key === 'task') this.state.bar = this.state.class = '';
    drl.note(drl.stateOf('samples'));
    this.draw();
  },

  // A bar shows the images of its bin; pressed again, all.
  choose(bar) {
    const at = String([...bar.parentElement.children].indexOf(bar));
    this.set('bar', this.state.bar === at ? '' : at);
  },

  async copy(button) {
    const text = button.previousElementSibling.innerText;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = 'Copied';
    } catch {
      getSelection().selectAllChildren(button.previousElementSibling);
      button.textContent = 'Marked: copy it with your keyboard';
    }
    setTimeout(() => { button.textContent = 'Copy'; }, 2500);
  },

  sorts: {
    best: (a, b) => b.reward - a.reward,
    worst: (a, b) => a.reward - b.reward,
    praised: (a, b) => b.advantage - a.advantage,
    blamed: (a, b) => a.advantage - b.advantage,
    seed: (a, b) => a.seed - b.seed,
    drawn: (a, b) => a.index - b.index,
  },

  // Whether a sample is among those that are asked for.
  fits(item, bin) {
    const {find, only} = this.state, data = item.dataset, reward = +data.reward;
    if (!data.prompt.toLowerCase().includes(find.trim().toLowerCase())) return false;
    if (only === 'path' ? !data.path : only !== 'all' && data.side !== only) return false;
    if (this.state.class) {
      const classes = Object.values(JSON.parse(data.classes)), wanted = this.state.class;
      if (wanted === '?' ? !classes.includes(null) : !classes.includes(wanted)) return false;
    }
    return !bin || reward >= bin.low && (reward < bin.high || bin.last && reward <= bin.high);
  },

  // The page as the controls say.
  draw() {
    const page = this.root && this.root.querySelector('.samples-page');
    if (!page) return;
    const sections = [...page.querySelectorAll('section')];
    const shown = sections.find(s => s.dataset.task === this.state.task) || sections[0];
    for (const section of sections) section.hidden = section !== shown;
    for (const label of page.querySelectorAll('[data-of]')) label.hidden = label.dataset.of !== shown.dataset.task;
    const values = {...this.state, task: shown.dataset.task};
    for (const [key, value] of Object.entries(values)) {
      for (const control of page.querySelectorAll(`.tools [name=${key}]`)) {
        if (control.type === 'radio') control.checked = control.value === value;
        else if (control.value !== value) control.value = value;
      }
    }
    const bars = [...shown.querySelectorAll('.bars button')];
    const chosen = bars[this.state.bar === '' ? -1 : +this.state.bar];
    const bin = chosen && {low: +chosen.dataset.low, high: +chosen.dataset.high, last: chosen === bars.at(-1)};
    for (const bar of bars) bar.setAttribute('aria-pressed', bar === chosen);
    const grid = shown.querySelector('.sample-grid'), items = [...grid.children];
    const key = item => ({index: +item.dataset.index, reward: +item.dataset.reward, advantage: +item.dataset.advantage, seed: +item.dataset.seed});
    const order = this.sorts[this.state.sort] || this.sorts.best;
    const sorted = items.map(item => [key(item), item]).sort((a, b) => order(a[0], b[0]) || a[0].index - b[0].index);
    if (sorted.some(([, item], i) => item !== items[i])) grid.append(...sorted.map(([, item]) => item));
    let count = 0;
    for (const item of items) {
      item.hidden = !this.fits(item, bin);
      count += !item.hidden;
    }
    shown.querySelector('.tally').textContent = `${count} of ${items.length} images`;
    shown.querySelector('.none').hidden = count > 0;
  },
};
