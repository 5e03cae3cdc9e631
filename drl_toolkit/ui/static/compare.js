// The page that draws: a first grid at once, what was asked for in the address, and what can be taken with a click.
drl.compare = {
  defaults: {prompts: '', seeds: '0-3', epochs: 'base, tuned', guidance: '', rows: 'epoch', columns: 'seed'},
  state: null,
  fields: {prompts: '#prompt textarea', epochs: '#epochs-drawn :is(input, textarea)'}, // that a click can fill
  first: false, // whether the next grid is the one that the address asks for

  // Runs where the component of the page is made.
  follow(element, watch) {
    this.state = drl.begin('compare', this);
    element.addEventListener('click', event => {
      const button = event.target.closest('[data-prompt], [data-epochs]');
      if (!button) return;
      const field = button.dataset.epochs ? 'epochs' : 'prompts';
      this.fill(field, button.dataset.epochs || button.dataset.prompt);
    });
    watch('value', () => this.begin(element));
    this.begin(element);
  },

  begin(element) {
    const page = element.querySelector('[data-todo]');
    if (!page) return;
    delete page.dataset.todo;
    this.first = true;
    this.draw(0);
  },

  // Other words in a field, and the grid of them.
  fill(name, words) {
    const field = document.querySelector(this.fields[name]);
    if (!field) return;
    field.value = words;
    field.dispatchEvent(new Event('input', {bubbles: true}));
    this.draw(100); // once Gradio has taken the words
  },

  draw(wait) {
    setTimeout(() => document.getElementById('draw')?.click(), wait);
  },

  // What is drawn now, field by field, into the address; each grid that somebody asked for can be gone back to.
  asked(values) {
    Object.keys(this.defaults).forEach((key, i) => { this.state[key] = values[i] ?? ''; });
    if (drl.asked() === 'compare') drl.note(drl.stateOf('compare'), !this.first);
    this.first = false;
  },
};
