// The table of runs: it is sorted and filtered here; what is changed goes to the server, which then draws it anew.
window.drlRuns = {
  defaults: {words: '', tag: '', by: ''}, // by: the name of a column, with a minus where it falls
  state: null,

  follow(element, watch) {
    this.state = drl.begin('runs', this);
    element.addEventListener('input', event => {
      if (!event.target.matches('.filter')) return;
      this.set('words', event.target.value);
      this.show(element);
    });
    element.addEventListener('click', event => {
      const button = event.target.closest('button');
      if (!button) return;
      if (button.dataset.sort) this.choose(button);
      if (button.dataset.tag) this.set('tag', this.state.tag === button.dataset.tag ? '' : button.dataset.tag);
      if (button.dataset.restore) this.send({action: 'restore', id: button.dataset.restore});
      if (button.dataset.edit) this.edit(button);
      this.show(element);
    });
    watch('value', () => this.show(element));
    this.show(element);
  },

  set(key, value) {
    this.state[key] = value;
    drl.note(drl.stateOf('runs'));
  },

  // A column was chosen to sort by; once more turns it round.
  choose(button) {
    const name = button.textContent, up = button.dataset.sort === 'text' ? name : `-${name}`;
    const turned = this.state.by.startsWith('-') ? name : `-${name}`;
    this.set('by', this.state.by.replace('-', '') === name ? turned : up);
  },

  // The column that is sorted by: {column, kind, up}; none where the address names no column.
  sort(element) {
    const name = this.state.by.replace('-', '');
    const button = name && [...element.querySelectorAll('[data-sort]')].find(b => b.textContent === name);
    if (button) return {column: button.closest('th').cellIndex, kind: button.dataset.sort, up: !this.state.by.startsWith('-')};
  },

  // Sort and filter as was chosen, also after the server has drawn the table anew.
  show(element) {
    const body = element.querySelector('table.list tbody');
    if (!body) return;
    const rows = [...body.rows], sort = this.sort(element), {column, kind, up} = sort || {};
    if (sort) {
      const value = row => kind === 'number' ? +row.cells[column].dataset.value : row.cells[column].innerText.trim().toLowerCase();
      rows.sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (up ? 1 : -1));
      body.append(...rows);
      element.querySelectorAll('table.list th').forEach((th, i) => {
        if (th.querySelector('[data-sort]')) th.setAttribute('aria-sort', i !== column ? 'none' : up ? 'ascending' : 'descending');
      });
    }
    const {words: asked, tag} = this.state, words = asked.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const tags = [...row.querySelectorAll('td:last-child .chip')].map(chip => chip.textContent);
      row.hidden = !words.every(word => text.includes(word)) || (tag !== '' && !tags.includes(tag));
      shown += !row.hidden;
    }
    const field = element.querySelector('.filter');
    if (field.value !== asked) field.value = asked;
    element.querySelectorAll('[data-tag]').forEach(b => b.setAttribute('aria-pressed', b.dataset.tag === tag));
    element.querySelector('.tools output').textContent = shown < rows.length ? `${shown} of ${rows.length}` : '';
  },

  async send(values) {
    const answer = await fetch('runs', {method: 'POST', body: new URLSearchParams(values)});
    if (!answer.ok) alert(await answer.text());
    return answer.ok;
  },

  // What is said of a run, in a window of its own: the table may be drawn anew meanwhile.
  edit({dataset}) {
    const dialog = document.createElement('dialog');
    dialog.className = 'look edit-run';
    dialog.setAttribute('aria-labelledby', 'edit-name');
    dialog.innerHTML = `<form method="dialog"><h2 id="edit-name"></h2>
      <label>Title <input name="title" maxlength="80"></label>
      <label>Tags, separated by commas <input name="tags" maxlength="300"></label>
      <label>Note <textarea name="note" rows="4" maxlength="2000"></textarea></label>
      <p><button class="copy" value="notes">Save</button> <button class="copy" value="delete">Delete this run</button>
        <button class="copy" value="">Cancel</button></p></form>`;
    dialog.querySelector('h2').textContent = dataset.edit;
    for (const name of ['title', 'tags', 'note']) dialog.querySelector(`[name=${name}]`).value = dataset[name];
    dialog.addEventListener('close', async () => {
      const fields = Object.fromEntries(new FormData(dialog.querySelector('form')));
      if (dialog.returnValue) await this.send({action: dialog.returnValue, run: dataset.edit, ...fields});
      dialog.remove();
    });
    document.querySelector('.gradio-container').append(dialog);
    dialog.showModal();
  },
};
