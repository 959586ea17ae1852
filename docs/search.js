// A flag is found by its name: to the search, a dash in front of a word means "without it".
document.addEventListener("input", ({ target }) => {
  if (target.matches(".md-search__input")) target.value = target.value.replace(/^-+/, "")
}, true)
