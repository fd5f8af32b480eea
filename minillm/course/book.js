// The text below each result of a search. Sphinx looks for the stems of the words ("rotari" for
// "rotary"), in all that is on a page, buttons included, and so often finds nothing to show.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;      // on all pages but the one with the results
  const summary = Search.makeSearchSummary;
  Search.makeSearchSummary = (html, stems, anchor) =>
    summary(html, new Set([...stems].map((stem) => stem.replace(/[ei]$/, ""))), anchor);
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    page.querySelectorAll(".headerlink, .linenos, script, style").forEach((x) => x.remove());
    const article = page.querySelector("article") ?? page.body;
    const part = anchor ? article.querySelector(anchor) : null;
    return (part ?? article).textContent.replace(/\s+/g, " ");
  };
});
