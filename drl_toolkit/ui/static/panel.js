// What the browser does by itself: moves through the steps of a path, plays them, keeps the address in step with what is seen.
window.drl = {
  step: 1,
  timer: null,

  // Write what is seen into the address; an empty value leaves it.
  note(values) {
    const url = new URL(location);
    for (const [key, value] of Object.entries(values)) {
      if (value === null || value === '') url.searchParams.delete(key);
      else url.searchParams.set(key, value);
    }
    history.replaceState(null, '', url);
  },

  // Another page was chosen.
  turn(view) {
    const asked = new URL(location).searchParams;
    const shown = asked.get('view') || (asked.get('sample') ? 'trajectories' : 'overview');
    if (view !== shown) this.note({view, sample: null});
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
