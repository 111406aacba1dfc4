// Sliders and units of the report. Without a script, the strips, maps and rows are read as they are.
for (const play of document.querySelectorAll(".play")) {
  const answer = play.querySelector(".answer"), said = play.querySelector("output");
  const slider = play.querySelector("input"), units = [...play.querySelectorAll("button")];
  const {scales, scores, without, metric, task} = JSON.parse(play.dataset.play);
  const number = (value) => value.toFixed(3).replace("-", "−");
  const show = (kind, at, count, words) => {
    answer.className = `picture answer ${kind}`;
    answer.style.backgroundPositionY = `${count > 1 ? 100 * at / (count - 1) : 0}%`;
    answer.style.backgroundSize = `100% ${100 * count}%`;
    said.textContent = words;
    answer.setAttribute("aria-label", `${task}, answer, ${words}`);
  };
  const scale = () => {
    const at = Number(slider.value);
    show("scale", at, scales.length, `scale ${scales[at].toFixed(2)}: ${metric} ${number(scores[at])}`);
    slider.setAttribute("aria-valuetext", said.textContent);
  };
  slider.addEventListener("input", scale);
  for (const unit of units) {
    const at = Number(unit.dataset.at);
    const look = () => show("without", at, units.length, `without ${unit.dataset.name}: ${metric} ${number(without[at])}`);
    unit.addEventListener("pointerenter", look);
    unit.addEventListener("focus", look);
    unit.addEventListener("click", look);
    unit.addEventListener("pointerleave", scale);
    unit.addEventListener("blur", scale);
  }
  play.classList.add("live");
  scale();
}
