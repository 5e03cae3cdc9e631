// The player of a path; Gradio runs this where the component is made.
element.addEventListener('input', event => {
  if (event.target.matches('.player input')) drl.choose(element, +event.target.value);
});
element.addEventListener('click', event => {
  const button = event.target.closest('.play, [data-step]');
  if (!button) return;
  if (button.matches('.play')) drl.play(element);
  else drl.choose(element, +button.dataset.step);
});
watch('value', () => drl.show(element, drl.step));
drl.show(element, drl.step);
