// What each block would have drawn, by depth. `props.views` comes from Python.

const strip = element.querySelector(".blocks");

function show() {
  const figures = props.views.map((view) => {
    const figure = document.createElement("figure");
    const picture = document.createElement("img");
    picture.src = view.picture;
    picture.alt = `what ${view.block} would have drawn`;
    const name = document.createElement("figcaption");
    name.textContent = view.block;
    figure.append(picture, name);
    return figure;
  });
  strip.replaceChildren(...figures);
}

watch("views", show);
show();
