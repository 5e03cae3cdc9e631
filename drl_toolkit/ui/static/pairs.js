// Pairs of images before and after training: their order, what is shown of them, and one of them large.
drl.pairs = {
  defaults: {show: 'side', count: '8', order: 'change', find: ''},
  state: null,
  root: null,    // of the page
  viewer: null,  // the dialog; it lies beside the page, so that it stays open while the page is drawn anew
  cell: null,    // the pair that is large

  // Runs where the component of the page is made.
  follow(element, watch) {
    this.root = element;
    this.state = drl.begin('pairs', this);
    element.addEventListener('input', event => this.changed(event.target));
    element.addEventListener('click', event => {
      const button = event.target.closest('.open');
      if (button) this.open(+button.closest('li').dataset.cell);
    });
    watch('value', () => this.draw());
    this.draw();
  },

  // A control was moved.
  changed(control) {
    if (control.closest('.drag')) return this.drag(control);
    if (!(control.name in this.state)) return;
    this.set(control.name, control.value);
  },

  set(key, value) {
    this.state[key] = value;
    drl.note({[key]: value === this.defaults[key] ? null : value});
    this.draw();
    this.fill();
  },

  drag(control) {
    control.closest('.drag').style.setProperty('--at', control.value + '%');
  },

  page() {
    return this.root && this.root.querySelector('.pairs-page');
  },

  // Those that the search leaves, in the order that was chosen.
  items() {
    const {order, find} = this.state, words = find.trim().toLowerCase();
    const all = [...this.page().querySelectorAll('.pair-grid > li')];
    const by = {
      change: (a, b) => b.dataset.change - a.dataset.change,
      least: (a, b) => a.dataset.change - b.dataset.change,
      cell: (a, b) => a.dataset.cell - b.dataset.cell,
    };
    all.sort(by[order] || by.change);
    return {all, found: all.filter(item => item.dataset.name.toLowerCase().includes(words))};
  },

  // The page as the controls say.
  draw() {
    const page = this.page();
    if (!page) return;
    for (const [key, value] of Object.entries(this.state)) {
      for (const control of page.querySelectorAll(`.tools [name=${key}]`)) {
        if (control.type === 'radio') control.checked = control.value === value;
        else if (control.value !== value) control.value = value;
      }
    }
    const grid = page.querySelector('.pair-grid'), {all, found} = this.items();
    const most = this.state.count === 'all' ? found.length : +this.state.count || 8;
    const shown = new Set(found.slice(0, most));
    const placed = [...grid.children];
    if (all.some((item, i) => item !== placed[i])) grid.append(...all);
    for (const item of all) item.hidden = !shown.has(item);
    grid.dataset.show = this.state.show;
    page.querySelector('.tally').textContent = `${shown.size} of ${all.length} pairs`;
    page.querySelector('.none').hidden = found.length > 0;
    this.place(page);
    const asked = new URL(location).searchParams.get('pair');
    if (asked !== null && this.cell === null && /^\d+$/.test(asked)) this.open(+asked);
  },

  // The page's dialog, once, beside the page.
  place(page) {
    const dialog = page.querySelector('dialog');
    if (!dialog) return;
    if (this.viewer && this.viewer.open) {
      dialog.remove();
      return this.fill();
    }
    if (this.viewer) this.viewer.remove();
    this.viewer = dialog;
    document.body.append(dialog);
    dialog.addEventListener('close', () => this.closed());
    dialog.addEventListener('input', event => this.inside(event.target));
    dialog.addEventListener('click', event => {
      if (event.target === dialog || event.target.closest('.close')) dialog.close();
      const step = event.target.closest('.step');
      if (step) this.move(+step.dataset.by);
    });
    dialog.addEventListener('keydown', event => {
      const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!by || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      if (event.target.matches('input')) return;
      event.preventDefault();
      this.move(by);
    });
  },

  inside(control) {
    if (control.closest('.drag')) return this.drag(control);
    if (control.name === 'through') return this.fill(+control.value);
    this.set('show', control.value);
  },

  open(cell) {
    if (!this.page().querySelector(`li[data-cell="${cell}"]`)) return;
    this.cell = cell;
    this.fill(null);
    if (!this.viewer.open) this.viewer.showModal();
    drl.note({pair: cell});
  },

  closed() {
    this.cell = null;
    drl.note({pair: null});
  },

  move(by) {
    const cells = this.items().found.map(item => +item.dataset.cell);
    const to = cells[cells.indexOf(this.cell) + by];
    if (to !== undefined) this.open(to);
  },

  // The dialog: one pair, at the epoch of its slider. `null` is the page's own epoch.
  fill(at) {
    const page = this.page(), viewer = this.viewer;
    if (this.cell === null || !page) return;
    const item = page.querySelector(`li[data-cell="${this.cell}"]`);
    if (!item) return viewer.close();
    const {before, after, epochs: words} = page.dataset, epochs = words.split(' ');
    const slider = viewer.querySelector('[name=through]');
    slider.max = epochs.length - 1;
    if (at === null) slider.value = epochs.indexOf(after);
    viewer.querySelector('.through').hidden = epochs.length < 3;
    const epoch = epochs[+slider.value], label = epoch === '0' ? 'base' : 'epoch ' + epoch;
    const was = before === '0' ? 'base' : 'epoch ' + before;
    viewer.querySelector('.through output').textContent = label;
    slider.setAttribute('aria-valuetext', label);
    viewer.dataset.show = this.state.show;
    for (const radio of viewer.querySelectorAll('[type=radio]')) radio.checked = radio.value === this.state.show;
    const name = item.dataset.name, of = at => `${page.dataset.address}&epoch=${at}&cell=${this.cell}`;
    viewer.setAttribute('aria-label', name);
    viewer.querySelector('h2').textContent = name;
    this.picture('.one.was', 'one', of(before), `${was}: ${name}`);
    this.picture('.one.is', 'one', of(epoch), `${label}: ${name}`);
    this.picture('.one.heat', 'one', `${of(epoch)}&against=${before}`, 'where the two differ');
    this.picture('.drag', 'is', of(epoch), `${label}: ${name}`);
    this.picture('.drag', 'was', of(before), `${was}: ${name}`);
    for (const place of ['.one.was figcaption', '.drag .left']) viewer.querySelector(place).textContent = was;
    for (const place of ['.one.is figcaption', '.drag .right']) viewer.querySelector(place).textContent = label;
    const cells = this.items().found.map(other => +other.dataset.cell), place = cells.indexOf(this.cell);
    viewer.querySelector('.where').textContent = `${place + 1} of ${cells.length}`;
    viewer.querySelector('[data-by="-1"]').disabled = place <= 0;
    viewer.querySelector('[data-by="1"]').disabled = place >= cells.length - 1;
  },

  // An image at the head of a place; it is made when it is first needed, since one without an address is none.
  picture(place, kind, address, alt) {
    const parent = this.viewer.querySelector(place);
    let image = parent.querySelector(`img.${kind}`);
    if (!image) {
      image = Object.assign(new Image(), {className: kind});
      parent.prepend(image);
    }
    if (image.getAttribute('src') !== address) image.src = address;
    image.alt = alt;
  },
};
