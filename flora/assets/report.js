// A click on a column's title sorts a table by it, a second one the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const down = title.getAttribute("aria-sort") === "ascending";
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [row, row.cells[place]]);
      const compare = ([, one], [, other]) => {
        const [x, y] = [one, other].map((cell) => parseFloat(cell.dataset.value));
        if (isNaN(x) && isNaN(y)) return one.textContent.localeCompare(other.textContent);
        if (isNaN(x) || isNaN(y)) return isNaN(x) ? 1 : -1;
        return x - y;
      };
      rows.sort((one, other) => (down ? compare(other, one) : compare(one, other)));
      body.append(...rows.map(([row]) => row));
    });
  });
}
