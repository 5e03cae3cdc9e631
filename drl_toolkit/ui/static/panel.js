// What the browser does by itself: moves through the steps of a path, plays them, keeps the address in step with what is seen.
window.drl = {
  step: 1,
  timer: null,
  here: new URL(location), // what was shown last
  views: {}, // view -> what keeps its state in the address: {defaults, state}
  opened: false, // whether the tab that the address asks for is there: Gradio opens its first one before

  // Write what is seen into the address; an empty value leaves it. What is pushed can be gone back to.
  note(values, push = false) {
    const url = new URL(location);
    for (const [key, value] of Object.entries(values)) {
      if (value === null || value === '') url.searchParams.delete(key);
      else url.searchParams.set(key, value);
    }
    if (url.href === location.href) return;
    history[push ? 'pushState' : 'replaceState'](null, '', url);
    this.here = url;
  },

  // The page that the address asks for.
  asked() {
    const asked = new URL(location).searchParams;
    return asked.get('view') || (asked.get('sample') ? 'trajectories' : 'overview');
  },

  // What a view begins with: its own words of the address, where the address is about it.
  begin(view, page) {
    this.views[view] = page;
    const asked = this.asked() === view ? new URL(location).searchParams : new URLSearchParams();
    return Object.fromEntries(Object.entries(page.defaults).map(([key, value]) => [key, asked.get(key) ?? value]));
  },

  // What the address says of a view, and nothing of another's.
  stateOf(view) {
    const said = {};
    for (const page of Object.values(this.views)) for (const key in page.defaults) said[key] = null;
    const {defaults = {}, state = {}} = this.views[view] || {};
    for (const key in defaults) if (state[key] !== defaults[key]) said[key] = state[key];
    return said;
  },

  // Whether a view is as the address says.
  asSaid(view) {
    const asked = new URL(location).searchParams;
    return Object.entries(this.stateOf(view)).every(([key, value]) => asked.get(key) === (value ?? null));
  },

  // Another page was chosen.
  turn(view) {
    document.body.dataset.view = view;
    if (this.opened && view !== this.asked()) this.note({sample: null, step: null, pair: null, ...this.stateOf(view), view}, true);
  },

  // Back and forward: another tab of the same thing is turned to; anything else is loaded anew.
  follow() {
    const now = new URL(location);
    const same = ['run', 'epoch'].every(key => now.searchParams.get(key) === this.here.searchParams.get(key));
    const tab = document.getElementById(`tab-${this.asked()}-button`);
    const deeper = ['sample', 'step', 'pair'].some(key => now.searchParams.get(key));
    if (!same || !tab || deeper || !this.asSaid(this.asked())) return location.reload();
    this.here = now;
    document.body.dataset.view = this.asked();
    tab.click();
  },

  // Copy what a button holds.
  async copy(button) {
    const text = button.dataset.text;
    try {
      await navigator.clipboard.writeText(text.trim());
    } catch { // not over plain HTTP from another machine
      const field = document.body.appendChild(document.createElement('textarea'));
      field.value = text.trim();
      field.select();
      document.execCommand('copy');
      field.remove();
    }
    const label = button.textContent;
    button.textContent = 'copied';
    setTimeout(() => { button.textContent = label; }, 1500);
  },

  // One step of the path on the page.
  show(root, step) {
    const path = root.querySelector('.path');
    if (!path) return;
    const all = path.querySelectorAll('.strip li');
    this.step = Math.max(1, Math.min(step, all.length));
    all.forEach((item, i) => {
      const shown = i + 1 === this.step;
      item.querySelector('button').setAttribute('aria-current', shown);
      if (!shown) return;
      for (const kind of ['noisy', 'predicted']) {
        path.querySelector('.big.' + kind).setAttribute('src', item.querySelector('img.' + kind).getAttribute('src'));
      }
      path.querySelector('.told').innerHTML = item.querySelector('div[hidden]').innerHTML;
    });
    path.querySelector('input').value = this.step;
    path.querySelector('output').textContent = `step ${this.step} of ${all.length}`;
  },

  // A step that somebody chose, for the address too.
  choose(root, step) {
    this.show(root, step);
    this.note({step: this.step > 1 ? this.step : null});
  },

  // All steps one after the other, or no more.
  play(root) {
    const count = root.querySelectorAll('.strip li').length;
    if (this.timer) {
      clearInterval(this.timer);
      this.timer = null;
    } else {
      this.show(root, this.step >= count ? 1 : this.step + 1);
      this.timer = setInterval(() => {
        this.show(root, this.step + 1);
        if (this.step >= count) this.play(root);
      }, 450);
    }
    const button = root.querySelector('.play');
    if (!button) return;
    button.textContent = this.timer ? '❚❚' : '▶';
    button.setAttribute('aria-label', this.timer ? 'pause' : 'play the steps');
  },
};

drl.step = +new URL(location).searchParams.get('step') || 1;
addEventListener('popstate', () => drl.follow());
const mark = () => { document.body.dataset.view = drl.asked(); };
if (document.body) mark();
else document.addEventListener('DOMContentLoaded', mark);

// The tab key stops at the tab that is chosen, and arrow keys lead to the others; each page is named by its tab.
drl.nameTabs = pages => {
  const set = (element, name, value) => { if (element.getAttribute(name) !== value) element.setAttribute(name, value); };
  for (const tab of pages.querySelectorAll('[role=tab]')) {
    set(tab, 'tabindex', tab.getAttribute('aria-selected') === 'true' ? '0' : '-1');
    const panel = document.getElementById(tab.getAttribute('aria-controls'));
    if (panel) set(panel, 'aria-labelledby', tab.id);
  }
  const chosen = pages.querySelector('[role=tab][aria-selected=true]'), row = chosen?.closest('[role=tablist]');
  if (!row || drl.chosenTab === chosen.id) return;
  const view = chosen.id.slice('tab-'.length, -'-button'.length);
  drl.opened ||= view === drl.asked() || !document.getElementById(`tab-${drl.asked()}-button`);
  drl.turn(view); // here, and not by an event of Gradio's, which comes when the server has answered
  drl.chosenTab = chosen.id;
  const show = () => { // where tabs do not fit
    const at = chosen.getBoundingClientRect(), frame = row.getBoundingClientRect();
    if (at.left < frame.left || at.right > frame.right) row.scrollLeft += at.left - frame.left - 40;
  };
  for (const wait of [0, 300, 1500]) setTimeout(show, wait); // Gradio may still move them
};
new MutationObserver((_, watch) => {
  const pages = document.getElementById('pages');
  if (!pages?.querySelector('[role=tab]')) return;
  watch.disconnect();
  const tidy = () => drl.nameTabs(pages);
  new MutationObserver(tidy).observe(pages, {subtree: true, childList: true, attributeFilter: ['aria-selected', 'tabindex']});
  tidy();
}).observe(document, {childList: true, subtree: true});

// Arrow keys turn to the next tab, and take the focus along.
document.addEventListener('keydown', event => {
  const move = {ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity}[event.key];
  if (!move || event.target.getAttribute?.('role') !== 'tab') return;
  const tabs = [...event.target.closest('[role=tablist]').querySelectorAll('[role=tab]')].filter(tab => tab.offsetParent);
  const at = tabs.indexOf(event.target) + move;
  const next = tabs[Number.isFinite(at) ? (at + tabs.length) % tabs.length : at < 0 ? 0 : tabs.length - 1];
  event.preventDefault();
  event.stopImmediatePropagation();
  next.click();
  setTimeout(() => document.getElementById(next.id)?.focus(), 0);
}, true);

document.addEventListener('click', event => {
  const button = event.target.closest('[data-text]');
  if (button) drl.copy(button);
});
