// node check.mjs URL CHROMIUM TEXTS.json THRESHOLD [PICTURE.png]: the page's answers as JSON.
// THRESHOLD is a number, or "own".
import { readFileSync } from "node:fs";
import puppeteer from "puppeteer-core";

const [url, executablePath, file, threshold, picture] = process.argv.slice(2);
const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox"] });
try {
  const page = await browser.newPage();
  await page.goto(url);
  const ready = "document.body.dataset.answers || document.querySelector('#error').textContent";
  await page.waitForFunction(ready, { timeout: 60_000 });
  await page.evaluate((texts, level) => {
    delete document.body.dataset.answers;
    document.querySelector("#texts").value = texts.join("\n");
    document.querySelector("#own").checked = level === "own";
    if (level !== "own") document.querySelector("#threshold").value = level;
    document.querySelector("#texts").dispatchEvent(new Event("input"));
  }, JSON.parse(readFileSync(file, "utf8")), threshold);
  await page.waitForFunction(ready, { timeout: 60_000 });
  if (picture) await page.screenshot({ path: picture, fullPage: true });
  const error = await page.$eval("#error", (each) => each.textContent);
  console.log(error ? JSON.stringify({ error }) : await page.evaluate("document.body.dataset.answers"));
} finally {
  await browser.close();
}
