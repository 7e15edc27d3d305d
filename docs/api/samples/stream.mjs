// Run a command and follow it, resuming at the last event whatever breaks. Node 18 or newer.
// Needs URL, KEY, PROJECT; arguments: the command. Exits with the command's exit code.
const { URL: url, KEY, PROJECT } = process.env;
const headers = { "X-API-Key": KEY, "Content-Type": "application/json" };

async function submit(command) {
  const answer = await fetch(`${url}/projects/${PROJECT}/shell`, {
    method: "POST", headers, body: JSON.stringify({ command }),
  });
  if (!answer.ok) throw new Error(await answer.text());
  return (await answer.json()).data.id;
}

async function* events(command, after) {
  const answer = await fetch(`${url}/commands/${command}/events`, {
    headers: { ...headers, "Last-Event-ID": after },
  });
  if (!answer.ok) throw Object.assign(new Error(await answer.text()), { isFinal: true });
  let text = "";
  for await (const piece of answer.body.pipeThrough(new TextDecoderStream())) {
    const frames = (text + piece).split("\n\n");
    text = frames.pop();
    for (const frame of frames) {
      const fields = Object.fromEntries(frame.split("\n").map((line) => {
        const at = line.indexOf(": ");
        return [line.slice(0, at), line.slice(at + 2)];
      }));
      yield { id: fields.id, name: fields.event, data: JSON.parse(fields.data) };
    }
  }
}

async function follow(command) {
  for (let after = "0"; ;) {
    try {
      for await (const { id, name, data } of events(command, after)) {
        after = id ?? after;
        if (name === "output" && "line" in data) {
          process[data.stream].write(data.line + (data.partial ? "" : "\n"));
        } else if (name === "complete") {
          return data.exit_code ?? 1;
        }
      }
    } catch (error) {
      if (error.isFinal) throw error; // 404, 410, 401: coming back would not help
      console.error(`lost the stream (${error.message}), resuming behind ${after}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

process.exitCode = await follow(await submit(process.argv.slice(2).join(" ")));
