// What the pointer is on, said at the foot of the page: a finger has no tooltip.
document.addEventListener("pointerover", ({target}) => {
  const said = target.title || (target.tagName == "circle" ? target.textContent : "");
  document.querySelector("output").textContent = said;
});
// The name of a run hides and shows its curves.
for (const button of document.querySelectorAll("button")) button.onclick = () => {
  const off = button.classList.toggle("off");
  for (const line of document.querySelectorAll("." + button.dataset.run)) line.style.display = off ? "none" : "";
};
