// The page that draws: a first grid at once, and prompts that can be taken with a click.
drl.compare = {
  // Runs where the component of the page is made.
  follow(element, watch) {
    element.addEventListener('click', event => {
      const button = event.target.closest('[data-prompt]'), field = document.querySelector('#prompt textarea');
      if (!button || !field) return;
      field.value = button.dataset.prompt;
      field.dispatchEvent(new Event('input', {bubbles: true}));
      this.draw(100);  // once Gradio has taken the words
    });
    watch('value', () => this.begin(element));
    this.begin(element);
  },

  begin(element) {
    const page = element.querySelector('[data-todo]');
    if (!page) return;
    delete page.dataset.todo;
    this.draw(0);
  },

  draw(wait) {
    setTimeout(() => document.getElementById('draw')?.click(), wait);
  },
};
