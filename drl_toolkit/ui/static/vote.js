// The voting page, alone or in the panel: arrow keys vote, and inside the panel the next pair comes without a new page.
window.ballot = {
  // Put what the server answers in place of what is shown.
  async show(root, address, options) {
    const answer = await fetch(address, options);
    const page = new DOMParser().parseFromString(await answer.text(), 'text/html');
    const next = page.getElementById('ballot');
    const focus = document.activeElement;
    const kept = root.contains(focus) && focus.id;
    root.replaceChildren(next || document.createTextNode('The server does not answer.'));
    // Keys go on where they were; after a click on the tab they belong to the pair.
    if (kept) document.getElementById(kept)?.focus({preventScroll: true});
    else if (this.clicked) next?.focus({preventScroll: true});
    this.clicked = false;
  },

  // Follow a part of the panel: its `data-ballot` is the address of the voting page.
  follow(element, watch) {
    const open = () => {
      const root = element.querySelector('[data-ballot]');
      if (root) this.show(root, root.dataset.ballot);
    };
    element.addEventListener('submit', event => {
      const root = element.querySelector('[data-ballot]');
      event.preventDefault();
      const vote = new URLSearchParams(new FormData(event.target, event.submitter));
      this.show(root, root.dataset.ballot, {method: 'POST', body: vote});
    });
    watch('value', open);
    open();
  },
};

addEventListener('click', event => {
  if (!event.detail || !event.target.closest('[role=tab]')) return; // by the keyboard
  ballot.clicked = true;
  setTimeout(() => document.querySelector('#ballot')?.offsetParent && document.getElementById('ballot').focus({preventScroll: true}), 50);
});

addEventListener('keydown', event => {
  const choice = {ArrowLeft: 'left', ArrowRight: 'right', ArrowDown: 'tie', ArrowUp: 'bad', u: 'undo'}[event.key];
  const button = choice && document.getElementById(`vote-${choice}`);
  const modified = event.repeat || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey;
  const focus = document.activeElement;
  const typing = /INPUT|TEXTAREA/.test(focus.tagName) || focus.getAttribute('role') === 'tab';
  if (!button || button.disabled || !button.offsetParent || modified || typing) return;
  event.preventDefault();
  button.click();
});
