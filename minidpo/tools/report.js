// What the pointer is on, said at the foot of the page: a finger has no tooltip.
const output = document.querySelector("output");
document.addEventListener("pointerover", ({target}) => {
  output.textContent = target.title || (target.tagName == "circle" ? target.textContent : "");
});
// The name of a run hides and shows its curves.
for (const button of document.querySelectorAll("button")) button.onclick = () => {
  const off = button.classList.toggle("off");
  for (const line of document.querySelectorAll("." + button.dataset.run)) line.style.display = off ? "none" : "";
};
// Paper cannot be unfolded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => part.open = true));
