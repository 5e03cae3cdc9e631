// What was served at once steps aside when Gradio has drawn the same.
(page => {
  const first = document.getElementById('first');
  const drawn = () => document.querySelector(`#${page} :is(h1, h2)`);
  const watch = new MutationObserver(() => {
    if (!drawn()) return;
    watch.disconnect();
    first.remove();
  });
  document.body.classList.toggle('dark', matchMedia('(prefers-color-scheme: dark)').matches);
  watch.observe(document.body, {childList: true, subtree: true});
})(document.getElementById('first').dataset.page);
